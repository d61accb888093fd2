"""Rules between the task and everything else; `distill.recipe.rules` lists them, and says how rules are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from distill.recipe import names
from distill.recipe.arm_rules import path_of_arm
from distill.recipe.data import Data
from distill.recipe.fields import KeyPath, Mistake
from distill.recipe.locate import DECODER_FLAGS, TeacherSize
from distill.recipe.sections import Evaluation, Teacher, Training
from distill.recipe.student import Calibration, Mlp
from distill.recipe.terms import TERM_KEYS, Term

MLP: KeyPath = ("student", "mlp")


def terms_fit_the_task(terms: Mapping[int, Term], data: Data) -> Iterator[Mistake]:
    """Refuse terms that compare what the head of the task does not have."""
    for index, term in terms.items():
        if ":" not in data.task and data.task not in TERM_KEYS[term.match].tasks:
            message = f"match: {term.match} compares sentence embeddings, and task: {data.task} makes none"
            yield Mistake(("losses", index, "match"), message, "write match: logits or match: hidden")


def students_answers_are_scored(data: Data, terms: Mapping[int, Term], training: Training) -> Iterator[Mistake]:
    """Refuse answers of the student that have no prompt, no end, or nobody to learn from."""
    own, path = training.on_policy, ("training", "on_policy")
    if own is None:
        return
    most = data.max_length - 1 if data.task == "chat" else data.max_target_length or data.max_length
    if ":" not in data.task and data.task not in names.PROMPTED_TASKS:
        yield Mistake(path, f"the rows of task: {data.task} have no prompt", "use chat or seq2seq", at="key")
    if data.learn_from == "all":
        yield Mistake(path, "learn_from: all does not say where an answer begins", "use assistant", at="key")
    if all(term.match == "labels" for term in terms.values()):
        message = "no term compares with the teacher, who is to score what the student writes"
        yield Mistake(path, message, "add match: logits", at="key")
    if training.tokens is not None:
        message = "how many tokens the student will write is not known"
        yield Mistake(("training", "tokens"), message, "give steps or epochs", at="key")
    if own.max_new_tokens > most:
        message = f"{own.max_new_tokens} do not fit in what data allows"
        yield Mistake((*path, "max_new_tokens"), message, f"use at most {most}")
    for index, term in terms.items():
        if term.match == "labels" and own.share == 1:
            message = "has no effect: with on_policy.share: 1 there are no answers but the student's, without labels"
            yield Mistake(("losses", index, "match"), message, "remove it, or lower the share")


def metrics_fit_the_task(data: Data, evaluation: Evaluation, training: Training) -> Iterator[Mistake]:
    """Refuse metrics that are neither the task's nor the user's own."""
    own = names.TASK_METRICS.get(data.task)  # type: ignore[call-overload]
    if own is None:
        return
    message = f"task: {data.task} has no such metric"
    compared = [name for name in names.TEACHER_METRICS if (name in names.VECTOR_METRICS) == (data.task == "embedding")]
    known = (*own, *names.OTHER_METRICS.get(data.task, ()), *compared)  # type: ignore[call-overload]
    for position, metric in enumerate(evaluation.metrics or []):
        if metric not in known and ":" not in metric:
            yield Mistake(("evaluation", "metrics", position), f"{message} as {metric}", f"use {', '.join(known)}")
    quick = [metric for metric in own if metric not in names.GENERATED_METRICS]
    if training.keep_best not in (None, *quick):
        message += f" as {training.keep_best} during training"
        yield Mistake(("training", "keep_best"), message, f"use {', '.join(quick)}")


def harness_has_a_language_model(data: Data, evaluation: Evaluation) -> Iterator[Mistake]:
    """Refuse tasks of lm-evaluation-harness for models that predict no next token."""
    if evaluation.harness is not None and data.task not in names.CAUSAL_TASKS:
        message = f"lm-evaluation-harness measures language models, and task: {data.task} makes none"
        yield Mistake(("evaluation", "harness"), message, "remove it", at="key")


def embeddings_have_what_is_learnt_and_measured(
    teacher: Teacher, data: Data, terms: Mapping[int, Term], evaluation: Evaluation, training: Training
) -> Iterator[Mistake]:
    """Refuse what needs pairs, or scores, of an embedding without them."""
    if data.task != "embedding":
        return
    pairs, scores = data.learns_from_pairs, "score" in data.columns
    learners: list[KeyPath] = [("losses", index, "match") for index, term in terms.items() if term.match == "labels"]
    learners += [("teacher", "fit")] if teacher.fit else []
    learners += [path] if (path := path_of_arm(evaluation, "labels_only")) else []
    for path in learners if not pairs else ():
        message = "learns that text and pair belong together, and data.columns names no pair, or a score beside it"
        yield Mistake(path, message, "remove it, or name a pair")
    given: list[tuple[KeyPath, str]]
    given = [(("evaluation", "metrics", at), name) for at, name in enumerate(evaluation.metrics or [])]
    given += [(("training", "keep_best"), training.keep_best)] if training.keep_best else []
    for path, name in given:
        if (name in names.RETRIEVAL_METRICS and not pairs) or (name == "spearman" and not scores):
            needs = "a pair without a score" if name != "spearman" else "a score"
            yield Mistake(path, f"{name} needs {needs} in data.columns", "remove it")


def majority_is_defined(data: Data, evaluation: Evaluation) -> Iterator[Mistake]:
    """Refuse the most frequent answer of a task whose answers are texts, places or vectors."""
    path = path_of_arm(evaluation, "majority")
    if path and data.task in names.NO_MAJORITY:
        yield Mistake(path, f"no answer is the most frequent one in task: {data.task}", "remove it")


def gradients_have_a_loss(data: Data, mlp: Mlp, calibration: Calibration) -> Iterator[Mistake]:
    """Refuse gradients for an embedding: the loss of a text alone is none."""
    if data.task != "embedding":
        return
    if names.READS.get(mlp.score) == "gradients":  # type: ignore[call-overload]
        message = f"score: {mlp.score} reads gradients of the loss of single examples, and an embedding has none"
        yield Mistake((*MLP, "score"), message, "choose activation, or another that reads activations")
    if calibration.gradients:
        message = "an embedding has no loss of single examples, and so no gradients"
        yield Mistake(("student", "calibration", "gradients"), message, "remove it")


def teacher_fits_the_task(data: Data, size: TeacherSize) -> Iterator[Mistake]:
    """Refuse a teacher that sees the tokens that it is to predict, or whose stacks are not those of the task."""
    path, family = ("teacher", "model"), size.family
    speech, causal = family in names.SPEECH_FAMILIES, data.task in names.CAUSAL_TASKS
    if size.layers is not None and ":" not in data.task and speech != (data.task == "speech_to_text"):
        message = f"{family} reads {'sound' if speech else 'text'}, and task: {data.task} does not"
        yield Mistake(path, message, f"name a {'text model' if speech else 'Whisper'}, or another task")
    elif data.task in names.TWO_STACK_TASKS and size.layers is not None and size.encoder_layers is None:
        message = f"{family} has one stack of layers, and task: {data.task} needs an encoder and a decoder"
        yield Mistake(path, message, "name an encoder-decoder, e.g. a T5 or BART, or another task")
    elif causal and size.encoder_layers is not None:
        message = f"{family} is an encoder-decoder, and task: {data.task} needs a decoder alone"
        yield Mistake(path, message, "name a decoder, e.g. a Llama or GPT-2, or another task")
    elif causal and size.both_ways:
        flag = DECODER_FLAGS.get(str(family))
        message = f"{family} is an encoder: a token sees those after it, which task: {data.task} lets it predict"
        trained = f"; if it was trained as a decoder, its config.json must say {flag}: true" if flag else ""
        yield Mistake(path, message, f"name a decoder, e.g. a Llama or GPT-2{trained}")


def reader_fits(data: Data, first: TeacherSize, own: TeacherSize, path: KeyPath) -> Iterator[Mistake]:
    """Refuse a model beside the first teacher that is none for the task, or has other stacks or too few positions."""
    found = list(teacher_fits_the_task(data, own)) or list(examples_fit(data, own))
    if (
        not found
        and None not in (first.layers, own.layers)
        and (first.encoder_layers is None) != (own.encoder_layers is None)
    ):
        message = f"{own.family} and the teacher, {first.family}, do not both have an encoder and a decoder"
        found = [Mistake(path, message, "name a model with the teacher's stacks")]
    yield from (replace(each, path=path, message=each.message.replace("the teacher has", "it has")) for each in found)


def examples_fit(data: Data, size: TeacherSize) -> Iterator[Mistake]:
    """Refuse examples that are longer than the teacher has positions for."""
    for key, length in (("max_length", data.max_length), ("max_target_length", data.max_target_length)):
        if size.positions and length is not None and length > size.positions:
            message = f"{length} tokens per example, the teacher has {size.positions} positions"
            yield Mistake(("data", key), message, f"use at most {size.positions}")

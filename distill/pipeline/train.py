"""Stages `train` and `control`: train the cut student, taught by the teacher or on labels alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from distill.data import TASKS, TrainingBatches, evaluation_batches
from distill.data.tasks import Task
from distill.errors import InputError
from distill.evaluation.arms import measured
from distill.evaluation.metrics import HIGHER_IS_BETTER, compute
from distill.evaluation.predict import gathered, predict
from distill.files import content_of, fresh_folder
from distill.losses import LayerMap, Objective, layer_map
from distill.models.attention import relation_widths
from distill.models.cost import matmul_rate, training_flops
from distill.models.family import layers_of
from distill.models.load import folder_fingerprint, hollow_model
from distill.models.plan import StudentPlan
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage, identity, results, settings_of
from distill.ranks import process_state
from distill.recipe.schema import Optimization, Recipe, Term, Training
from distill.registry import find
from distill.student.masks import check_score, compact_trained, mask_settings, masks_for
from distill.teacher import LiveTeacher
from distill.training import Job, TrainDir, make_accelerator, train
from distill.training.optim import find_optimizer
from distill.training.setup import horizon
from distill.training.sharding import shard
from distill.training.tracking import check_trackers

LABELS_ONLY = (Term(match="labels"),)


def distil(session: Session) -> None:
    """Train the student on everything that the recipe's loss asks for."""
    recipe, inputs = session.recipe, identity(training_inputs(session))
    job = job_for(recipe, "distilled", recipe.training, session.run.training, inputs)
    train_arm(session, job, recipe.losses, session.run.distilled)


def train_control(session: Session) -> None:
    """Train the same student for the same steps on labels alone: what distillation has to beat."""
    recipe, arm, spec = session.recipe, "labels_only", session.recipe.training
    if spec.steps is None:  # fewer examples carry a label, so the same epochs would be fewer steps
        spec = spec.model_copy(update={"epochs": None, "tokens": None, "steps": steps_of(session, spec)})
    job = job_for(recipe, arm, spec, session.run.control(arm), identity(control_inputs(session)))
    train_arm(session, job, LABELS_ONLY, session.run.control_model(arm))


def training_inputs(session: Session) -> dict[str, Any]:
    """Student, teacher, data, loss and settings."""
    return {
        **control_inputs(session),
        "teacher": folder_fingerprint(session.teacher),
        "plan": content_of(session.run.plan),
        "losses": [term.model_dump(mode="json") for term in session.recipe.losses],
        "teacher_dtype": session.recipe.teacher.dtype,
    }


def control_inputs(session: Session) -> dict[str, Any]:
    """Student, data and settings; the teacher has no say."""
    return {
        "student": folder_fingerprint(session.start),
        "mask": mask_settings(session.recipe),
        "data": session.corpus.fingerprint,
        "training": settings_of(session.recipe.training),
        "seed": session.recipe.seed,
    }


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_training(recipe: Recipe, task: Task) -> None:
    """Find what the trainings of a recipe need, before hours are spent.

    Raises:
        InputError: Something is not installed, or there is no such thing.
    """
    for key, spec in (("training", recipe.training), ("teacher.fit", recipe.teacher.fit)):
        if spec is not None:
            find_optimizer(spec)
            if spec.precision == "fp16" and process_state().device.type == "cpu":
                raise InputError(f"{key}.precision: fp16 needs a GPU; use bf16 or fp32")
    check_trackers(recipe.training.trackers)
    if recipe.training.keep_best not in (None, *task.metrics):
        raise InputError(f"training.keep_best: {recipe.training.keep_best} is not one of {', '.join(task.metrics)}")
    if recipe.teacher.dtype == "int8":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise InputError("teacher.dtype: int8 needs bitsandbytes: pip install 'distill[int8]'")
        if process_state().device.type != "cuda":
            raise InputError("teacher.dtype: int8 needs a GPU; use bf16")
    if recipe.teacher.device == "sharded" and process_state().num_processes == 1:
        raise InputError("teacher.device: sharded spreads the teacher over several processes, and there is one")


def placed_teacher(session: Session, objective: Objective) -> LiveTeacher:
    """The teacher where and in what the recipe wants it."""
    spec, device = session.recipe.teacher, process_state().device
    if spec.dtype == "int8":
        model = session.load(session.teacher, int8_on=device)
    else:
        model = session.load(session.teacher)
        model.to(DTYPES.get(spec.dtype, model.dtype))
    if spec.device == "sharded":
        model = shard(model.requires_grad_(False).to(device), layers_of(model))
    return LiveTeacher(model, objective.teacher, torch.device("cpu") if spec.device == "cpu" else device)


def job_for(recipe: Recipe, title: str, spec: Training, folder: TrainDir, inputs: str) -> Job:
    """The training of a student."""
    return Job(
        title,
        spec,
        folder,
        recipe.seed,
        inputs,
        spec.log_every,
        spec.evaluate_every,
        keep_best=(spec.keep_best, HIGHER_IS_BETTER.get(spec.keep_best, True)) if spec.keep_best else None,
        trackers=tuple(spec.trackers),
    )


def train_arm(session: Session, job: Job, terms: Sequence[Term], result: Path) -> None:
    """Train the student on some terms, and save it as `result`."""
    decided = StudentPlan.load(session.run.plan)
    maps = partial(layer_map, plan=decided, student_layers=len(decided.layers), teacher_layers=decided.teacher_layers)
    objective = Objective(terms, session.corpus.task.head, maps, session.vocabulary)
    teacher, model = None, session.load(session.start)
    if objective.needs_teacher:
        teacher = placed_teacher(session, objective)
        objective.project(model.config.hidden_size, teacher.model.config.hidden_size)
        for each in (model, teacher.model) if objective.student.attention else ():
            each.set_attn_implementation("eager")  # the only one that keeps the probabilities
    job = replace(job, constraint=masks_for(session.recipe, model, steps_of(session, session.recipe.training)))
    train_model(session, job, model, objective, teacher)
    compact_trained(session.recipe, model, session.say)
    save_model(session, model, result)


def train_model(session: Session, job: Job, model: Any, objective: Objective, teacher: LiveTeacher | None) -> None:
    """Train a model in place; it comes back on the CPU, in the dtype it had."""
    batches = batches_for(session, job.spec, labelled=not objective.needs_teacher)
    dtype = model.dtype
    model.float()  # AdamW's small steps would be lost in half-precision weights; autocast gives the speed
    accelerator = make_accelerator(job.spec, batches, job.trackers, job.folder.root)
    train(
        replace(job, limit=limit_of(session, job, model, teacher)),
        model,
        objective,
        teacher,
        batches,
        accelerator,
        evaluate=partial(held_out, session),
        say=session.say,
    )
    model.to(device="cpu", dtype=dtype)


def limit_of(session: Session, job: Job, model: Any, teacher: LiveTeacher | None) -> float | None:
    """Tokens per second of a training whose time all goes into matrix products; None where they cannot be counted."""
    spec = session.recipe.teacher
    if teacher is not None and (spec.dtype == "int8" or spec.device != "same"):
        return None
    rate = matmul_rate(process_state().device, DTYPES[job.spec.precision]) * process_state().num_processes
    return float(rate / training_flops(model, teacher and teacher.model, session.recipe.data.max_length))


def batches_for(session: Session, spec: Optimization, *, labelled: bool) -> TrainingBatches:
    """The micro-batches of a training, of the labelled examples alone or of all."""
    corpus = session.corpus
    # Without teacher terms an unlabelled example would be a wasted forward pass.
    pool = corpus.labelled if labelled else range(len(corpus.train))
    micro = spec.micro_batch_size or max(1, spec.batch_size // process_state().num_processes)
    return TrainingBatches(corpus, pool, spec.batch_size, micro, session.recipe.seed)


def steps_of(session: Session, spec: Optimization) -> int:
    """Optimizer steps of the student's training."""
    labelled = all(term.match == "labels" for term in session.recipe.losses)
    return horizon(spec, batches_for(session, spec, labelled=labelled))


def held_out(session: Session, model: Any, stopped: Callable[[], bool]) -> dict[str, float | None]:
    """The task's metrics on the test split, shared out over the processes; none once `stopped` says so."""
    corpus, state = session.corpus, process_state()
    size = session.recipe.evaluation.batch_size
    batches = evaluation_batches(corpus, corpus.test, size, state.process_index, state.num_processes)
    wanted = takewhile(lambda _batch: not stopped(), batches)
    columns = predict(model, wanted, corpus.task.head, vocabulary=session.vocabulary)
    if state.num_processes > 1:
        columns = gathered(columns, gather_object)
    if not columns:
        return {}
    return measured(compute(corpus.task.metrics, columns))


def save_model(session: Session, model: Any, folder: Path) -> None:
    """Save a model and the tokenizer, from the main process."""
    if process_state().is_main_process:
        with fresh_folder(folder) as temporary:
            model.save_pretrained(temporary)
            session.tokenizer.save_pretrained(temporary)


def check(session: Session) -> None:
    """Find every loss, optimizer and tracker that the recipe names, and what they need, before hours are spent.

    Raises:
        InputError: A name leads nowhere, its params do not fit, a package is missing, or there are no labels for what
            learns from them.
    """
    recipe, task = session.recipe, find(TASKS, session.recipe.data.task, "task")()
    check_score(recipe)
    Objective(recipe.losses, task.head, lambda _policy: LayerMap(((0, 0),)))
    check_training(recipe, task)
    check_labels(session)
    check_relation_heads(session)


def check_labels(session: Session) -> None:
    """Refuse to learn from labels where no training example has one; the last to do so may be trained after hours.

    Raises:
        InputError: With everything in the recipe that learns from labels.
    """
    recipe, texts = session.recipe, session.texts
    if texts.task.head == "next_token" or any(label is not None for _, label in texts.train):
        return
    learners = ["teacher.fit"] if recipe.teacher.fit else []
    terms = [index for index, term in enumerate(recipe.losses) if term.match == "labels"]
    learners += [f"losses.{index} (match: labels)" for index in terms]
    learners += ["evaluation.arms (labels_only)"] if "labels_only" in recipe.evaluation.arms else []
    if learners:
        raise InputError(
            f"data: no training example has a label, and these learn from labels: {', '.join(learners)}; "
            f"give labels to some training examples in {recipe.data.source}, or leave these out of the recipe"
        )


def check_relation_heads(session: Session) -> None:
    """Refuse relation heads that do not divide the teacher's queries, keys or values; the student's are as wide.

    Raises:
        InputError: They do not divide one of these widths.
    """
    asked = {
        f"losses.{index}.params.heads": int(term.params["heads"])  # a whole number, as `Objective` has checked
        for index, term in enumerate(session.recipe.losses)
        if term.match == "relations" and "heads" in term.params and ":" not in (term.loss or "")
    }
    if not asked:
        return
    model = hollow_model(session.source, session.remote_code)
    widths = sorted({width for layer in range(len(layers_of(model))) for width in relation_widths(model, layer)})
    for key, heads in asked.items():
        for width in widths:
            if width % heads:
                raise InputError(f"{key}: {heads} does not divide {width}, a width of the teacher's attention")


STAGE = Stage("train", distil, training_inputs, results(lambda run: run.distilled), together=True, check=check)
CONTROL = Stage(
    "control",
    train_control,
    control_inputs,
    results(lambda run: run.control_model("labels_only")),
    wanted=lambda recipe: "labels_only" in recipe.evaluation.arms,
    together=True,
)

"""Every value that a recipe may choose from a list passes through a whole run, to a release that its gate has seen.

Twelve tiny runs share the values among them. What no run here can have is refused, and `REFUSED` says with which words.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import re
import shutil
import types
from collections import defaultdict
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import pytest
import torch
import transformers
from pydantic import BaseModel
from tiny import tiny_config, tiny_model, tiny_project
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from distill import load_student
from distill.cli import main
from distill.data import TASKS
from distill.evaluation.metrics import METRICS
from distill.losses import ATTENTION, HIDDEN, LOGITS, RELATION
from distill.recipe import load_recipe
from distill.recipe.controls import Control, Controls, Grid
from distill.recipe.names import GENERATED_METRICS, BuiltInSource
from distill.recipe.on_policy import OnPolicy
from distill.recipe.schema import Recipe, Source
from distill.student import LAYER_POLICIES
from distill.student.allocate import ALLOCATIONS
from distill.student.masks.masks import MASK_SCORES
from distill.student.scores import SCORES
from distill.training.optim import OPTIMIZERS

TABLES = {
    "Layers.choose": LAYER_POLICIES,
    "Mlp.score": SCORES,
    "Mlp.allocate": ALLOCATIONS,
    "Mask.score": MASK_SCORES,
    "Data.task": TASKS,
    "Term.loss (logits)": LOGITS,
    "Term.loss (hidden)": HIDDEN,
    "Term.loss (embeddings)": HIDDEN,
    "Term.loss (attention)": ATTENTION,
    "Term.loss (relations)": RELATION,
    "Optimization.optimizer": OPTIMIZERS,
    "Evaluation.metrics": METRICS,
}
"""Key of a recipe -> the table that its names come from."""

BASE = """\
name: tiny
seed: 3
teacher: {model: ./teacher}
student:
  layers: {keep: 2}
  mlp: {keep: 0.5, multiple_of: 8}
  calibration: {examples: 16, batch_size: 8}
data: {source: ./data.jsonl, task: classification, max_length: 16}
losses: [{match: logits}]
training: {steps: 4, batch_size: 8, micro_batch_size: 4, lr: 1e-3, save_every: 2, log_every: 2}
evaluation: {batch_size: 16, efficiency: false, arms: [teacher, cut, distilled]}
release: {license: apache-2.0}
"""
COMPILES = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
NAMES = {"id2label": dict(enumerate(["mammal", "none", "swimmer"]))}
FIT = "teacher.fit={steps: 20, batch_size: 8, lr: 3e-3}"


class Teacher(NamedTuple):
    """A tiny model that the runs distil from."""

    family: str
    task: str = "classification"
    changes: dict[str, Any] = {}  # noqa: RUF012


TEACHERS = {
    "bert": Teacher("bert"),
    "wide": Teacher("bert", changes={"intermediate_size": 8192}),  # its MLPs take nearly all of the time
    "distilbert": Teacher("distilbert"),
    "electra": Teacher("electra"),
    "bart": Teacher("bart", changes={"eos_token_id": 3}),
    "llama": Teacher("llama", "causal_lm"),
    "gpt2": Teacher("gpt2", "causal_lm"),
    "mixtral": Teacher("mixtral", "causal_lm"),
}

RUNS = {
    "a teacher fitted from nothing": (
        "bert",
        """
        teacher.init=random
        teacher.fit={steps: 12, batch_size: 8, lr: 3e-3, precision: bf16, weights: bf16, schedule: wsd, decay: 0.5}
        student.layers.choose=even
        student.mlp.score=activation
        student.repair={bias: true, refit: true, ridge: 0.01, held_out: 32}
        data.labelled=24
        losses=[
          {match: labels, weight: 0.3},
          {match: logits, loss: forward_kl, temperature: 2.0},
          {match: hidden, loss: mse, map: plan},
        ]
        training.schedule=cosine
        training.evaluate_every=2
        training.keep_best=accuracy
        evaluation.metrics=[accuracy, f1_macro, agreement, kl, loss]
        evaluation.arms=[teacher, majority, cut, repaired, distilled, labels_only, random_cut]
        evaluation.efficiency=true
        """,
    ),
    "widths by one ranking, released natively": (
        "bert",
        """
        teacher.dtype=bf16
        student.layers.choose=every
        student.mlp={keep: 0.6, score: activation_l2, allocate: global, floor: 8, protect: [3], multiple_of: 8}
        losses=[
          {match: logits, loss: reverse_kl, temperature: 3.0, scale_by_temperature: false},
          {match: hidden, loss: cosine, map: span},
          {match: attention, loss: kl, map: last},
        ]
        training.steps=null
        training.epochs=0.3
        training.schedule=linear
        training.trackers=[tensorboard]
        training.evaluate_every=2
        training.keep_best=f1_macro
        release.format=native
        release.language=en
        """,
    ),
    "masked weights, released padded": (
        "distilbert",
        """
        student.layers.choose=first
        student.mlp={keep: 0.6, score: output_norm, allocate: sensitivity,
          allocate_params: {strength: 0.9}, multiple_of: 2}
        student.mask={sparsity: 0.3, score: random, params: {seed: 1}, schedule: cubic, begin: 0.1, end: 0.6, every: 1}
        losses=[
          {match: logits, loss: symmetric_kl, temperature: 4,
            schedule: {temperature: 1, start: 0.1, end: 0.9, shape: cosine}},
          {match: embeddings, loss: mse},
        ]
        training.schedule=constant
        training.evaluate_every=2
        training.keep_best=loss
        training.precision=bf16
        training.weights=bf16
        release.format=padded
        """,
    ),
    "masked neurons, taken out": (
        "electra",
        """
        student.layers.choose=last
        student.mlp={score: wanda, multiple_of: 4}
        student.target={parameters: 0.65}
        student.mask={per: neuron, threshold: 0.5, score: magnitude, compact: uniform}
        losses=[
          {match: logits, loss: jsd, params: {beta: 0.2}, schedule: {params: {beta: 0.8}, shape: linear}},
          {match: relations, loss: qkv, params: {heads: 2}},
          {match: hidden, loss: normalized_mse, map: even},
        ]
        training.steps=null
        training.tokens=300
        """,
    ),
    "a teacher in main memory": (
        "bert",
        """
        teacher.sha256=SHA256
        teacher.device=cpu
        teacher.dtype=fp32
        student.layers={keep: 2, choose: random, params: {seed: 5}}
        student.mlp={score: magnitude, params: {norm: 1}, allocate: threshold,
          allocate_params: {mass: 0.8}, multiple_of: 4}
        data={source: ./renamed.csv, task: classification, columns: {text: words, label: kind},
          max_length: 12, test_share: 0.3, limit: 90}
        losses=[
          {match: logits, loss: skew_forward_kl, params: {alpha: 0.2}},
          {match: relations, loss: values},
          {match: hidden, loss: relative_mse, map: [[0, 1], [1, 3]], schedule: {weight: 0.1}},
        ]
        release.format=padded
        """,
    ),
    "FLOPs as the target": (
        "llama",
        """
        teacher.dtype=fp16
        student.layers={keep: 3, choose: block_influence, protect_last: 1}
        student.mlp={score: taylor, multiple_of: 8}
        student.target={flops: 0.6, length: 16}
        losses=[
          {match: logits, loss: skew_reverse_kl},
          {match: attention, loss: mse},
          {match: embeddings, loss: cosine},
        ]
        training={steps: 4, batch_size: 8, micro_batch_size: 4, schedule: wsd, decay: 0.3, warmup: 1,
          gradient_checkpointing: true, head_precision: fp32, compile: false}
        evaluation.metrics=[perplexity, token_accuracy, agreement, kl, loss]
        evaluation.arms=[teacher, cut, distilled, labels_only, from_scratch]
        evaluation.efficiency=true
        """,
    ),
    "compiled": (
        "llama",
        """
        student.layers={keep: 1, choose: angular, protect_first: 1}
        student.mlp.score=taylor_kl
        student.repair={merge: true}
        losses=[
          {match: logits, loss: total_variation},
          {match: hidden, map: last, schedule: {weight: 0, end: 0.5}},
        ]
        training.compile=true
        training.loader_workers=1
        """,
    ),
    "the average of the weights": (
        "gpt2",
        """
        student.layers.choose=loss_drop
        student.mlp.score=fisher
        losses=[
          {match: logits, loss: soft_cross_entropy},
          {match: embeddings, loss: normalized_mse},
        ]
        training={steps: 4, batch_size: 8, optimizer: "torch.optim:SGD", weight_decay: 0, ema: 0.9, ema_release: true,
          head_precision: bf16}
        """,
    ),
    "a mixture of experts": (
        "mixtral",
        """
        student.layers.choose=greedy_loss
        student.mlp.score=fluctuation
        losses=[
          {match: logits, loss: logit_mse},
          {match: embeddings, loss: relative_mse},
        ]
        training.only=["*.mlp.*"]
        training.evaluate_every=2
        training.keep_best=perplexity
        evaluation.efficiency=true
        """,
    ),
    "what AdamW can be told": (
        "llama",
        """
        teacher.fit={steps: 4, batch_size: 8, lr: 3e-3}
        student.layers.choose=even_rounded
        student.mlp.score=output_change
        student.calibration={examples: 16, batch_size: 8, gradients: true, gram: true}
        losses=[
          {match: logits, loss: adaptive_kl},
          {match: logits, loss: tail_aware_kl, params: {k: 5, beta: 3.0}},
        ]
        training.optimizer_params={eps: 1.0e-6}
        training.betas=[0.8, 0.99]
        training.max_grad_norm=null
        training.skip_spikes=null
        training.max_skipped=5
        training.evaluate_every=2
        training.keep_best=token_accuracy
        training.freeze=["*.embed_tokens.*"]
        """,
    ),
    "adapters in place of the weights": (
        "llama",
        """
        teacher.fit={steps: 4, batch_size: 8, lr: 3e-3, optimizer: adamw_8bit, lora: {rank: 2, also: ["*norm*"]}}
        losses=[{match: logits}, {match: relations}, {match: hidden}]
        training={steps: 4, batch_size: 8, micro_batch_size: 4, precision: bf16, weights: bf16, optimizer: adamw_8bit,
          lora: {rank: 4, alpha: 8, targets: [q_proj, "*.mlp.*"], dropout: 0.1, also: ["*norm*"]}}
        """,
    ),
    "an encoder-decoder": (
        "bart",
        """
        student.layers.keep=[0, 2]
        student.encoder_layers={keep: 3, choose: last}
        student.mlp={keep: 0.5, score: random, params: {seed: 2}, multiple_of: 4}
        student.mask={per: neuron, sparsity: 0.3, only: ["*decoder.layers.1.*"], compact: true}
        losses=[
          {match: labels},
          {match: logits},
          {match: attention},
          {match: hidden, stack: encoder, map: [[0, 1], [2, 3]]},
          {match: hidden, stack: decoder},
        ]
        evaluation.efficiency=true
        release.format=padded
        """,
    ),
    "vectors of pairs": (
        "bert",
        """
        data={source: ./data.jsonl, task: embedding, columns: {text: text, pair: label}, max_length: 16,
          prompts: {text: "red "}}
        losses=[
          {match: labels},
          {match: output, loss: mse},
          {match: logits, temperature: 0.1, scale_by_temperature: false},
        ]
        training.evaluate_every=2
        training.keep_best=mrr_at_10
        evaluation.metrics=[mrr_at_10, ndcg_at_10, recall_at_10, cosine_to_teacher, neighbours_kept]
        evaluation.efficiency=true
        """,
    ),
    "time as the target": (
        "wide",
        """
        student.layers.keep=4
        student.mlp={multiple_of: 2048}
        student.target={latency: 0.8, length: 64}
        student.calibration={examples: 16, batch_size: 8, gradients: false, gram: false}
        """,
    ),
}

REFUSED = {
    ("Teacher.dtype", "int8"): ("teacher.dtype=int8", "teacher.dtype: int8 needs"),
    ("Teacher.dtype", "fp8"): ("teacher.dtype=fp8", "teacher.dtype: fp8 needs a GPU; use bf16"),
    ("Teacher.fp8_max_kl", "a value"): ("teacher.fp8_max_kl=0.1", "has no effect with dtype: stored"),
    ("Teacher.device", "sharded"): ("teacher.device=sharded", "over several processes, and there is one"),
    ("Teacher.revision", "a value"): ("teacher.revision=main", "only hub ids have revisions"),
    ("Optimization.precision", "fp16"): ("training.precision=fp16", "training.precision: fp16 needs a GPU"),
    ("Training.keep_best", "agreement"): ("training.keep_best=agreement", "training.keep_best"),
    ("Training.keep_best", "kl"): ("training.keep_best=kl", "training.keep_best"),
    ("Training.keep_best", "cosine_to_teacher"): ("training.keep_best=cosine_to_teacher", "training.keep_best"),
    ("Training.keep_best", "neighbours_kept"): ("training.keep_best=neighbours_kept", "training.keep_best"),
    ("Optimization.head_precision", "tf32"): ("training.head_precision=tf32", "tf32 needs a GPU"),
}
"""(key, value) -> the override that asks for it, and what is said: here is no GPU and no hub."""
REFUSED |= {
    ("Training.trackers", name): (f"training.trackers=[{name}]", f"pip install 'distill[{name}]'")
    for name in ("trackio", "wandb")
    if importlib.util.find_spec(name) is None
}
ELSEWHERE = {
    ("Data.source", "stdlib-docstrings"): "seconds to read, at every stage; recipes/quickstart and tests/data have it",
    ("Data.source", "stdlib-sources"): "recipes/stdlib-lm and tests/data have it",
    ("Data.task", "question_answering"): "tests/data/tasks/test_question_answering.py",
    ("Data.stride", "a value"): "tests/data/tasks/test_question_answering.py",
    ("Data.task", "relation_extraction"): "tests/data/tasks/test_relation_extraction.py",
    ("Data.none_class", "a value"): "tests/data/tasks/test_relation_extraction.py",
    ("Data.task", "token_classification"): "tests/cli/test_label_tasks.py has it",
    ("Data.classes", "a value"): "tests/data/tasks/test_classification.py has it",
    ("Data.source", "stdlib-names"): "recipes/embedding-minilm has it",
    ("Training.keep_best", "ndcg_at_10"): "read as mrr_at_10 is",
    ("Training.keep_best", "recall_at_10"): "read as mrr_at_10 is",
    **{("Data.task", task): "tests/cli/test_language_tasks.py" for task in ("chat", "masked_lm")},
    ("Data.learn_from", "all"): "tests/data/tasks/test_chat.py",
    ("Data.learn_from", "a value"): "tests/data/tasks/test_chat.py",
    ("Data.mask_share", "a value"): "tests/data/tasks/test_masked_lm.py",
    ("Data.source", "pydoc-topics"): "recipes/smoke has it, in every test of it",
    ("Evaluation.sets", "a value"): "tests/cli/test_figures.py",
    **{
        (f"Harness.{key}", "a value"): "tests/cli/test_harness.py" for key in ("tasks", "folder", "limit", "batch_size")
    },
    ("Harness.num_fewshot", "a value"): "tests/cli/test_harness.py",
    ("Evaluation.harness", "a value"): "tests/cli/test_harness.py",
    ("Data.classes", True): "tests/data/tasks/test_classification.py",
    ("Data.classes", False): "as above",
    **{("Data.task", task): f"tests/data/tasks/test_{task}.py" for task in ("seq2seq", "speech_to_text")},
    **{(f"Data.{key}", "a value"): "tests/data/tasks/test_seq2seq.py" for key in ("max_target_length", "prefix")},
    ("Data.language", "a value"): "tests/data/tasks/test_speech_to_text.py",
    **{(f"Evaluation.{key}", "a value"): "tests/cli/test_control_arms.py" for key in ("controls", "seeds")},
    ("Training.on_policy", "a value"): "tests/cli/test_on_policy_run.py",
    **{(f"OnPolicy.{key}", "a value"): "tests/training/test_on_policy.py" for key in OnPolicy.model_fields},
    **{
        ("Release.also", form): "tests/cli/test_forms_run.py"
        for form in ("a value", "onnx", "int8", "ctranslate2", "gguf")
    },
}
ELSEWHERE |= {
    (f"{section.__name__}.{key}", "a value"): "tests/cli/test_control_arms.py and tests/recipe/test_control_rules.py"
    for section in (Controls, Control, Grid)
    for key in section.model_fields
}
ELSEWHERE |= {
    (f"TeacherCache.{key}", value): "tests/cli/test_caching.py, tests/pipeline/test_cache_stage.py, tests/teacher"
    for key, values in (("keep", ("hidden", "topk")), ("layers", ("mapped", "none")), ("dtype", ("bf16", "fp32")))
    for value in (*values, "a value")
} | {("TeacherCache.k", "a value"): "tests/teacher", ("Teacher.cache", "a value"): "tests/cli/test_caching.py"}
ELSEWHERE |= {
    (f"Data.{key}", value): "tests/data/test_splits.py and test_odd_inputs.py: rows, and what becomes of them"
    for key in ("train", "validation", "test", "validation_share", "contradictions")
    for value in ("a value", *get_args(BuiltInSource), "first", "majority", "drop", "keep")
}
ELSEWHERE |= {
    (f"Student.{key}", "a value"): "tests/cli/test_given_student.py" for key in ("from_", "revision", "sha256")
}
ELSEWHERE |= {
    (key, "a value"): "tests/cli/test_several_teachers.py"
    for key in ("Recipe.teachers", "Member.weight", "Member.sources")
}
ELSEWHERE |= {
    (f"Source.{key}", value): "tests/data/test_odd_inputs.py and test_hub.py: every kind of source and its options"
    for key in Source.model_fields
    for value in ("a value", *get_args(BuiltInSource), True, False)
}
ELSEWHERE |= {
    (key, metric): "the end-to-end test of its task, tests/data/tasks and tests/cli/test_language_tasks.py"
    for key in ("Evaluation.metrics", "Training.keep_best")
    for metric in (
        *("bits_per_byte", "masked_perplexity", "masked_accuracy", "exact_match_answer", "f1_answer", "f1_relations"),
        *GENERATED_METRICS,
    )
}
ELSEWHERE |= {
    (key, metric): "tests/cli/test_label_tasks.py and tests/data/tasks/test_classification.py have each kind of labels"
    for key in ("Evaluation.metrics", "Training.keep_best")
    for metric in (
        *("f1_micro", "matthews", "ece", "mse", "rmse", "pearson", "spearman", "teacher_mse"),
        *("entity_f1", "entity_precision", "entity_recall"),
    )
}


def project(folder, name):
    """A recipe beside its teacher, whose weights are random, and its data in two forms."""
    teacher = TEACHERS[name]
    recipe = tiny_project(folder, BASE.replace("task: classification", f"task: {teacher.task}"), teacher.family)
    if teacher.family == "bart":  # a class is read at the end token
        tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A [SEP]", special_tokens=[("[SEP]", 3)])
        tokenizer.save_pretrained(folder / "teacher")
        config = tiny_config("bart", **NAMES, **teacher.changes)
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "teacher")
    else:
        changes = teacher.changes | (NAMES if teacher.task == "classification" else {})
        tiny_model(teacher.family, pad_token_id=0, **changes).save_pretrained(folder / "teacher")
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    lines = ["kind,words", *(f"{row['label']},{row['text']}" for row in rows)]
    (folder / "renamed.csv").write_text("\n".join(lines) + "\n")
    return recipe


def overrides_of(name, recipe):
    """The run's overrides: each starts a line, and goes on where the next ones are indented."""
    weights = hashlib.sha256((recipe.parent / "teacher/model.safetensors").read_bytes()).hexdigest()
    text = inspect.cleandoc(RUNS[name][1]).replace("SHA256", weights)
    return re.split(r"\n(?=\w)", text)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Gives the recipe of a teacher that has learned its task, the same for every run of this module."""
    recipes = {}

    def get(name):
        if name not in recipes:
            folder = tmp_path_factory.mktemp(name)
            recipe = project(folder, name)
            assert main(["build", str(recipe), FIT, "--out", str(folder / "fit")]) == 0
            shutil.copytree(folder / "fit/teacher", folder / "teacher", dirs_exist_ok=True)
            recipes[name] = recipe
        return recipes[name]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=COMPILES) if "training.compile=true" in RUNS[name][1] else name for name in RUNS]
)
def test_every_choice_passes_through_a_run_to_a_release_that_stock_transformers_loads(name, fitted, tmp_path):
    recipe = fitted(RUNS[name][0])
    overrides = overrides_of(name, recipe)
    assert main(["run", str(recipe), *overrides, "--out", str(tmp_path / "run")]) == 0
    asked, run = load_recipe(recipe, overrides), tmp_path / "run"
    loader = getattr(transformers, TASKS[asked.data.task]().auto_class)
    native = asked.release.format == "native"
    released, info = loader.from_pretrained(run / "release", output_loading_info=True, trust_remote_code=native)
    assert not any(info.values())
    batch = AutoTokenizer.from_pretrained(run / "release")(["red cat runs fast here"], return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        logits, trained = released(**batch)[0], load_student(run / "distilled")(**batch)[0]
    torch.testing.assert_close(logits, trained, rtol=0, atol=1e-6)  # zeros of padding change the order of a sum
    found = json.loads((run / "evaluation.json").read_text())
    assert [arm["name"] for arm in found["arms"]] == asked.evaluation.arms
    assert (found["efficiency"] is not None) == asked.evaluation.efficiency
    card = (run / "release/README.md").read_text()
    for term in asked.losses:
        assert re.search(rf"^\| {term.match} \| .*{term.loss or ''}", card, re.MULTILINE)
    if asked.training.trackers:
        assert list(run.rglob("events.out.tfevents*"))


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_cannot_be_had_here_is_refused_before_anything_is_done(case, tmp_path, capsys):
    override, words = REFUSED[case]
    assert main(["run", str(project(tmp_path, "bert")), override, "--out", str(tmp_path / "run")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "override", "words"),
    [
        ("FSDP", "training.weights=bf16", "training.weights: bf16 does not go with FSDP"),
        ("FSDP", "training.optimizer=adamw_8bit", "training.optimizer: adamw_8bit does not go with FSDP"),
        (
            "FSDP",
            "teacher.fit={steps: 1, precision: bf16, weights: bf16}",
            "teacher.fit.weights: bf16 does not go with",
        ),
    ],
)
def test_a_launch_that_shards_weights_is_refused_what_it_cannot_hold(
    kind, override, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    overrides = ["training.precision=bf16", override, "--out", str(tmp_path / "run")]
    assert main(["run", str(project(tmp_path, "bert")), *overrides]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


def sections_in(value: Any) -> Iterator[BaseModel]:
    """A section and all sections in it."""
    if isinstance(value, BaseModel):
        yield value
        for name in type(value).model_fields:
            yield from sections_in(getattr(value, name))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from sections_in(each)


def parts_of(annotation: Any) -> Iterator[Any]:
    """The types that a union, an annotated type or a list is made of; of a dict nothing, its values are numbers."""
    if get_origin(annotation) in (Annotated, Union, types.UnionType, list, tuple):
        for part in get_args(annotation):
            yield from parts_of(part)
    else:
        yield annotation


def key_of(section: type[BaseModel], name: str) -> str:
    """`Class.key`, by the class that declares it: `training` and `teacher.fit` share most of theirs."""
    owner = next(each for each in reversed(section.__mro__) if name in inspect.get_annotations(each))
    return f"{owner.__name__}.{name}"


def keys_of(section: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    """The keys of a section and of all sections below it, with their fields."""
    for name, field in section.model_fields.items():
        yield key_of(section, name), field
        for part in parts_of(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from keys_of(part)


def listed_values(annotation: Any) -> set[Any]:
    """Every value that a key may have, where these can be counted."""
    found: set[Any] = set()
    for part in parts_of(annotation):
        found |= set(get_args(part)) if get_origin(part) is Literal else {True, False} if part is bool else set()
    return found


def test_no_key_and_no_listed_value_of_the_schema_is_left_out(tmp_path):
    seen, given = defaultdict(set), set()
    for name, (teacher, _) in RUNS.items():
        (folder := tmp_path / name).mkdir()
        recipe = project(folder, teacher)
        for section in sections_in(load_recipe(recipe, overrides_of(name, recipe))):
            for field, declared in type(section).model_fields.items():
                key, value = key_of(type(section), field), getattr(section, field)
                if value != declared.get_default(call_default_factory=True):
                    given.add(key)
                values = value if isinstance(value, list | tuple) else [value]
                seen[key] |= {each for each in values if isinstance(each, str | bool)}
                if key == "Term.loss":
                    seen[f"{key} ({section.match})"].add(value)
    wanted = {(key, value) for key, field in keys_of(Recipe) for value in listed_values(field.annotation)}
    wanted |= {(key, value) for key, table in TABLES.items() for value in table}
    left_out = {(key, value) for key, value in wanted if value not in seen[key]}
    left_out |= {(key, "a value") for key, field in keys_of(Recipe) if key not in given}
    assert left_out == {*REFUSED, *ELSEWHERE} & left_out, sorted(left_out - {*REFUSED, *ELSEWHERE}, key=str)
    assert not {case for case in REFUSED if case[1] in seen[case[0]]}

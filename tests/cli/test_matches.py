"""Every match and every kind of schedule, from the recipe through training to the card of the release."""

from __future__ import annotations

import json
from math import cos, pi
from typing import get_args

import pytest
import torch
from tiny import RECIPE, tiny_config, tiny_project
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distill.cli import main
from distill.losses import LOGITS, MATCHES
from distill.recipe.schema import Term

pytestmark = pytest.mark.slow

STEPS = """\
training: {steps: 5, batch_size: 120, micro_batch_size: 60, lr: 1e-3, save_every: 5, log_every: 1}
evaluation: {arms: [cut, distilled], efficiency: false}
release: {license: apache-2.0}
"""
WHOLE = "from 0.0 % to 100.0 % of the steps"
LOGITS_ARE = "predictions with the teacher's"
TERMS = {
    "labels": (
        "{match: labels, weight: 2.0, schedule: {weight: 0.5}}",
        ["predictions with labels", "the task's own", f"linear {WHOLE}", "2 to 0.5"],
        [2, 1.625, 1.25, 0.875, 0.5],
    ),
    "logits": (
        "{match: logits, schedule: {temperature: 4.0, end: 0.5}}",
        [LOGITS_ARE, "forward_kl", "temperature 1 to 4, linear from 0.0 % to 50.0 % of the steps", "1"],
        [1] * 5,
    ),
    "logits of one's own": (
        "{match: logits, loss: jsd, scale_by_temperature: false, params: {beta: 0.2}, schedule: {params: {beta: 0.8}}}",
        [LOGITS_ARE, "jsd", f"temperature 1, not multiplied by temperature², beta 0.2 to 0.8, linear {WHOLE}", "1"],
        [1] * 5,
    ),
    "hidden": (
        "{match: hidden, map: [[0, 1], [1, 3]], schedule: {weight: 3, start: 0.25, shape: cosine}}",
        [
            "outputs of mapped layers",
            "mse",
            f"map [[0, 1], [1, 3]], cosine {WHOLE.replace('0.0', '25.0', 1)}",
            "1 to 3",
        ],
        [1, 1, 2 - cos(pi / 3), 2 - cos(2 * pi / 3), 3],
    ),
    "embeddings": (
        "{match: embeddings, loss: cosine, weight: 0.5}",
        ["what goes into the first layer", "cosine", "\N{EN DASH}", "0.5"],
        [0.5] * 5,
    ),
    "attention": (
        "{match: attention, map: last, weight: 0.25}",
        ["attention probabilities of mapped layers", "kl", "map last", "0.25"],
        [0.25] * 5,
    ),
    "relations": (
        "{match: relations, map: span, params: {heads: 2}}",
        ["queries, keys and values of mapped layers, each with itself", "qkv", "map span, heads 2", "1"],
        [1] * 5,
    ),
}
"""Match, and what else it is about -> the term, its row in the card, and its weight at every step."""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with data and, in `fitted/teacher`, a teacher in which nothing drops out."""
    folder = tmp_path_factory.mktemp("matches")
    recipe = tiny_project(folder, RECIPE.replace("labelled: 24, ", ""))
    still = tiny_config("bert", pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    still.save_pretrained(folder / "teacher")
    spec = ["teacher.fit.steps=60", "teacher.fit.save_every=60", "teacher.fit.batch_size=16"]
    assert main(["plan", str(recipe), *spec, "--out", str(folder / "fitted")]) == 0
    return folder


@pytest.fixture(scope="module")
def run(project):
    """A run with all of these terms, to its release."""
    beginning = RECIPE.replace("labelled: 24, ", "").partition("losses:")[0]
    terms = "".join(f"  - {term}\n" for term, _, _ in TERMS.values())
    (project / "recipe.yaml").write_text(f"{beginning}losses:\n{terms}{STEPS}")
    fitted = ["teacher.model=./fitted/teacher", "teacher.init=pretrained", "teacher.fit=null"]
    assert main(["run", str(project / "recipe.yaml"), *fitted, "--out", str(project / "run")]) == 0
    return project / "run"


def train_records(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == "train"]


def card_rows(run):
    lines = (run / "release/README.md").read_text().replace("\\", "").splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]


def divergence(project, run):
    """Mean KL(teacher || cut student) over all texts, by transformers alone."""
    texts = [json.loads(line)["text"] for line in (project / "data.jsonl").read_text().splitlines()]
    inputs = AutoTokenizer.from_pretrained(run / "student")(texts, return_tensors="pt", padding=True)
    logits = []
    for folder in (run / "student", project / "fitted/teacher"):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        with torch.no_grad():
            logits.append(model(inputs.input_ids, attention_mask=inputs.attention_mask).logits)
    return LOGITS["forward_kl"](*logits).mean().item()


@pytest.mark.parametrize("match", TERMS)
def test_every_match_and_schedule_is_told_by_the_card_of_the_release(match, run):
    assert [match.split()[0], *TERMS[match][1]] in card_rows(run)


def test_every_schedule_is_followed_to_its_end(run):
    steps = train_records(run)
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5]
    for index, record in enumerate(steps):
        weights = [weights[index] for _, _, weights in TERMS.values()]
        values = list(record["terms"].values())
        assert all(values) or index == 0, values
        # One wrong weight would be seen: none of the products is small beside their sum.
        products = [weight * value for weight, value in zip(weights, values, strict=True)]
        assert min(products[:4] + products[5:]) > 1e-4 * record["loss"], products
        assert record["loss"] == pytest.approx(sum(products), rel=1e-6)


def test_the_student_begins_with_its_teachers_embeddings_and_is_taught_by_the_teacher(run, project):
    first = train_records(run)[0]["terms"]
    assert first["embeddings.cosine"] == 0
    # A student that was taught by itself would begin at 0.
    assert first["logits.forward_kl"] == pytest.approx(divergence(project, run), rel=0.2)


def test_every_match_that_a_task_reaches_is_among_these_runs():
    names = set(get_args(Term.model_fields["match"].annotation))
    assert {match.split()[0] for match in TERMS} == names - {"output"} == MATCHES.keys() - {"output"}

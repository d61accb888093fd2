"""Repair through the command line: what it leaves behind, what depends on it, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import RECIPE, tiny_project

from distill.cli import main

pytestmark = pytest.mark.slow

REPAIR = RECIPE.replace("student:\n", "student:\n  repair: {bias: true, refit: true}\n")
TEXTS = (
    RECIPE.replace("task: classification, labelled: 24,", "task: causal_lm,")
    .replace("fit: {steps: 12,", "fit: {steps: 40,")
    .replace("choose: every", "choose: first")
    .replace("student:\n", "student:\n  repair: {refit: true, merge: true}\n")
)


def stages(text):
    return [line.split(":")[0] for line in text.splitlines() if line.endswith("started")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repair")
    recipe = tiny_project(folder, REPAIR)
    assert main(["run", str(recipe), "evaluation.efficiency=false", "--out", str(folder / "run")]) == 0
    return recipe, folder / "run"


def test_every_step_is_measured_and_training_starts_from_the_result(finished):
    _, run = finished
    found = json.loads((run / "repair.json").read_text())
    assert [step["name"] for step in found["steps"]] == ["cut", "bias", "refit"]
    assert found["calibration"] == {"examples": 16} and found["held_out"]["examples"] == 83
    assert 0 < found["held_out"]["labelled"] <= 24
    for step in found["steps"][1:]:
        assert 0 <= step["error_left"] < 1 and step["notes"] == []
        assert [layer["teacher_layer"] for layer in step["layers"]] == [1, 3]
    assert all(set(step["held_out"]) == {"loss", "kl"} for step in found["steps"])
    cut, repaired, distilled = (
        load_file(run / name / "model.safetensors") for name in ("student", "repaired", "distilled")
    )
    changed = {name for name in cut if not torch.equal(cut[name], repaired[name])}
    assert {name.split("layer.")[1][2:] for name in changed} == {"output.dense.weight", "output.dense.bias"}
    assert distilled.keys() == repaired.keys()
    arms = {arm["name"]: arm["metrics"] for arm in json.loads((run / "evaluation.json").read_text())["arms"]}
    assert list(arms) == ["teacher", "cut", "repaired", "distilled", "labels_only", "majority"]
    assert arms["cut"] != arms["repaired"]


def test_card_and_report_show_the_steps(finished):
    _, run = finished
    card, report = (run / "release/README.md").read_text(), (run / "report.html").read_text()
    for text in (card, report):
        assert "calibration error left" in text and "gained)" in text and "repaired (" in text
        assert "the student after its repair, before training" in text


def test_a_changed_repair_reruns_what_starts_from_it_and_nothing_before(finished, tmp_path, capsys):
    recipe, run = finished
    shutil.copytree(run, tmp_path / "run")
    capsys.readouterr()
    fast = ["evaluation.efficiency=false", "--out", str(tmp_path / "run")]
    assert main(["evaluate", str(recipe), "student.repair.ridge=0.1", *fast]) == 0
    assert stages(capsys.readouterr().err) == ["repair", "train", "control", "evaluate"]
    assert main(["build", str(recipe), "student.repair.refit=false", "student.repair.bias=false", *fast]) == 0
    assert stages(capsys.readouterr().err) == []


def test_a_language_model_is_refitted_and_merged(tmp_path, capsys):
    recipe = tiny_project(tmp_path, TEXTS, "llama")
    assert main(["build", str(recipe), "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().err
    assert "  refit: " in text and "  merge: " in text and "held-out KL" in text
    steps = json.loads((tmp_path / "run/repair.json").read_text())["steps"]
    assert [layer["teacher_layer"] for layer in steps[-1]["layers"]] == [1]  # of 0 and 1, only 1 precedes a block
    assert steps[-1]["held_out"]["kl"] < steps[0]["held_out"]["kl"]


@pytest.mark.parametrize(
    ("family", "recipe", "words", "made"),
    [
        ("llama", TEXTS.replace("refit: true, merge", "bias: true, merge"), "MLPs of llama have no output bias", []),
        ("bert", REPAIR.replace("bias: true", "merge: true"), "no linear map of that output stands for", []),
        ("bert", REPAIR.replace("examples: 16", "examples: 512"), "takes all 99 training examples", ["data.json"]),
    ],
)
def test_what_cannot_be_had_is_said_before_anything_is_done(family, recipe, words, made, tmp_path, capsys):
    path = tiny_project(tmp_path, recipe, family)
    assert main(["run", str(path), "--out", str(tmp_path / "run")]) == 2
    assert words in capsys.readouterr().err
    assert [stamp.name for stamp in (tmp_path / "run/stages").glob("*")] == made

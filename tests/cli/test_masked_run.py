"""Masks through the command line, from the recipe to the release."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import RECIPE, tiny_batch, tiny_project
from transformers import AutoModelForSequenceClassification

from distill import load_student
from distill.cli import main
from distill.data import evaluation_batches
from distill.evaluation.metrics import compute
from distill.evaluation.predict import predict
from distill.models.forward import Capture
from distill.models.mlp import mlps_of
from distill.pipeline.folder import RunDir
from distill.pipeline.predictions import mask_untrained
from distill.pipeline.session import Session
from distill.recipe import load_recipe
from distill.teacher import LiveTeacher

pytestmark = pytest.mark.slow


def project(folder, mask):
    return tiny_project(folder, RECIPE.replace("  calibration:", f"  mask: {mask}\n  calibration:"))


def distill(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def mlp_zeros(folder):
    """Name -> where an MLP's weight is zero."""
    own = weights(folder).items()
    return {
        name: tensor == 0
        for name, tensor in own
        if ".layer." in name and "attention" not in name and name.endswith("dense.weight")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run with half of the weights masked from the start: (recipe, run folder)."""
    folder = tmp_path_factory.mktemp("masked")
    recipe = project(folder, "{sparsity: 0.5}")
    distill("run", recipe, "--out", folder / "run")
    return recipe, folder / "run"


def test_student_and_control_have_the_same_zeros_and_the_release_has_them_too(finished):
    _, run = finished
    zeros = mlp_zeros(run / "distilled")
    assert len(zeros) == 4 and sum(int(z.sum()) for z in zeros.values()) == sum(z.numel() for z in zeros.values()) // 2
    assert same(zeros, mlp_zeros(run / "controls/labels_only/model"))
    assert same(zeros, mlp_zeros(run / "release"))
    assert not same(weights(run / "distilled"), weights(run / "controls/labels_only/model"))
    assert not any(zero.any() for zero in mlp_zeros(run / "student").values())  # the folder is the student as cut


def test_nothing_of_the_masks_is_in_the_release_but_the_zeros(finished):
    _, run = finished
    model, info = AutoModelForSequenceClassification.from_pretrained(run / "release", output_loading_info=True)
    assert not any(info.values()) and weights(run / "release").keys() == weights(run / "student").keys()
    assert not any("mask" in file.name for file in (run / "release").iterdir())
    assert "mask" not in (run / "release/config.json").read_text()
    assert torch.isfinite(model(input_ids=tiny_batch()["input_ids"] % 17).logits).all()


def test_the_cut_arm_is_the_masked_student(finished):
    recipe, run = finished
    session = Session(load_recipe(recipe), recipe.parent, RunDir(run), say=lambda _text: None)
    teacher = LiveTeacher(session.load(session.teacher), Capture(), torch.device("cpu"))
    measured = {}
    for masked in (True, False):
        model = session.load(session.folder.student)
        if masked:
            mask_untrained(session.recipe, model, 12)
        batches = evaluation_batches(session.corpus, session.corpus.test, 16)
        measured[masked] = compute(["kl"], predict(model, batches, "sequence", teacher))["kl"]
    arms = {arm["name"]: arm for arm in json.loads((run / "evaluation.json").read_text())["arms"]}
    assert arms["cut"]["metrics"]["kl"] == measured[True] != measured[False]


def test_zeros_are_in_the_log_the_evaluation_and_the_card(finished):
    _, run = finished
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(record["sparsity"] == 0.5 for record in records if record["event"] == "train")
    found = json.loads((run / "evaluation.json").read_text())["sparsity"]
    assert found["zeros"] == 0.5 and found["widths"] == [24, 24] and len(found["matrices"]) == 4
    card = (run / "release/README.md").read_text()
    assert "| mask | 50.0 % of each MLP, per weight by magnitude, one_shot |" in card
    assert "| zeros in the MLPs | 50.0 % |" in card


def test_an_interrupted_training_continues_to_the_same_weights(finished, tmp_path):
    recipe, run = finished
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000012")  # as if killed after step 8
    shutil.rmtree(tmp_path / "run/distilled")
    distill("train", recipe, "--out", tmp_path / "run")
    assert same(weights(tmp_path / "run/distilled"), weights(run / "distilled"))


def test_a_changed_mask_reruns_training_and_nothing_before_it(finished, tmp_path, capsys):
    recipe, run = finished
    shutil.copytree(run, tmp_path / "run")
    distill("run", recipe, "--out", tmp_path / "run")
    assert "started" not in capsys.readouterr().err
    distill("evaluate", recipe, "student.mask.sparsity=0.25", "--out", tmp_path / "run")
    started = [line.split(":")[0] for line in capsys.readouterr().err.splitlines() if line.endswith("started")]
    assert started == ["train", "control", "evaluate"]
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["sparsity"]["zeros"] == 0.25


def test_neurons_masked_gradually_are_gone_from_the_compact_release(finished, tmp_path):
    _, run = finished
    mask = "{per: neuron, sparsity: 0.34, schedule: cubic, every: 2, compact: uniform}"
    trained = [f"teacher.model={run}/teacher", "teacher.init=pretrained", "teacher.fit=null"]
    recipe = project(tmp_path, mask)
    distill("run", recipe, *trained, "evaluation.arms=[cut,distilled]", "--out", tmp_path / "run")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/release")
    assert model.config.intermediate_size == 16  # 24 - 8, a multiple of 8
    arms = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert arms["sparsity"]["widths"] == [16, 16] and arms["sparsity"]["zeros"] == 0
    sizes = arms["efficiency"]["models"]
    assert sizes["student"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert "| MLP widths, compacted | 16, 16 |" in (tmp_path / "run/release/README.md").read_text()
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    shares = [record["sparsity"] for record in records if record["event"] == "train"]
    assert shares == sorted(shares) and 0 < shares[0] < shares[-1] == shares[-2] == 8 / 24


def test_layers_that_lost_different_numbers_are_released_padded(finished, tmp_path):
    _, run = finished
    trained = [f"teacher.model={run}/teacher", "teacher.init=pretrained", "teacher.fit=null", "training.steps=6"]
    recipe = project(tmp_path, "{per: neuron, sparsity: 0.4, only: ['*.layer.1.*'], compact: true}")
    recipe.write_text(recipe.read_text().replace("multiple_of: 8", "multiple_of: 2"))
    own = ["evaluation.arms=[cut,distilled]", "evaluation.efficiency=false", "release.format=padded"]
    distill("run", recipe, *trained, *own, "--out", tmp_path / "run")
    student = load_student(tmp_path / "run/distilled")
    assert [mlp.width for mlp in mlps_of(student)] == [24, 16]  # 24 - int(0.4 * 24) = 15, up to a multiple of 2
    config = json.loads((tmp_path / "run/distilled/config.json").read_text())
    assert config["per_layer_config"]
    released = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/release")
    assert released.config.intermediate_size == 24
    batch = {name: tensor % 17 for name, tensor in tiny_batch().items()}
    with torch.no_grad():
        torch.testing.assert_close(released(**batch).logits, student(**batch).logits, rtol=0, atol=1e-6)


def test_a_pattern_that_matches_nothing_is_said_before_the_training(tmp_path, capsys):
    recipe = project(tmp_path, "{sparsity: 0.5, only: ['*.down_proj.*']}")
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "student.mask.only: '*.down_proj.*' matches no weight" in error and "intermediate.dense.weight" in error


def test_the_recipe_in_the_document_is_valid(tmp_path):
    text = (Path(__file__).parents[2] / "docs/masks.md").read_text(encoding="utf-8")
    section, compacted = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    own = RECIPE[RECIPE.index("student:") : RECIPE.index("data:")]
    assert load_recipe(tiny_project(tmp_path, RECIPE.replace(own, section))).student.mask.sparsity == 0.5
    mask = compacted.removeprefix("mask: ").strip()
    assert load_recipe(project(tmp_path, mask)).student.mask.compact == "uniform"

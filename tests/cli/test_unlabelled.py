"""A corpus of which no training example has a label: what needs labels is named before anything is done."""

from __future__ import annotations

import json

import pytest
from tiny import RECIPE, tiny_model, tiny_project

from distill.cli import main
from distill.data.corpus import read_texts
from distill.recipe import load_recipe

READY = ["teacher.fit=null", "teacher.init=pretrained", "data.labelled=null"]
UNTAUGHT = RECIPE.replace("  - {match: labels, weight: 0.3}\n", "")


def unlabelled_project(folder, recipe):
    """A ready teacher, and a file whose test split alone has labels."""
    path = tiny_project(folder, recipe)
    loaded = load_recipe(path, READY)
    training = {text for text, _ in read_texts(loaded.data, loaded.seed, folder).train}
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    rows = [{**row, "label": None if row["text"] in training else row["label"]} for row in rows]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_model("bert", id2label=dict(enumerate(["mammal", "none", "swimmer"]))).save_pretrained(folder / "teacher")
    return path


CASES = {
    "the default arms": (UNTAUGHT, READY, "evaluation.arms (labels_only)"),
    "a term": (RECIPE, [*READY, "evaluation.arms=[teacher, distilled]"], "losses.0 (match: labels)"),
    "all of them": (RECIPE, READY[2:], "teacher.fit, losses.0 (match: labels), evaluation.arms (labels_only)"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_needs_labels_is_named_before_anything_is_done(case, tmp_path, capsys):
    recipe, overrides, needed = CASES[case]
    path = unlabelled_project(tmp_path, recipe)
    assert main(["run", str(path), *overrides, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert f"no training example has a label, and these learn from labels: {needed}; " in said and "leave" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_anything_that_needs_labels_the_whole_story_is_told(tmp_path):
    path, arms = unlabelled_project(tmp_path, UNTAUGHT), "evaluation.arms=[teacher, cut, distilled]"
    own = [*READY, arms, "evaluation.efficiency=false"]
    assert main(["run", str(path), *own, "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/release/model.safetensors").exists()

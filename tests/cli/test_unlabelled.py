"""A corpus of which no training example has a label: what needs labels is named once the data are read."""

from __future__ import annotations

import json

import pytest
from tiny import RECIPE, tiny_corpus, tiny_model, tiny_project

from distill.cli import main
from distill.models.load import load_tokenizer

ALL = ["training.evaluate_every=0", "data.labelled=null"]
READY = [*ALL, "teacher.fit=null", "teacher.init=pretrained"]
UNTAUGHT = RECIPE.replace("  - {match: labels, weight: 0.3}\n", "")


def unlabelled_project(folder, recipe):
    """A ready teacher, and a file whose test split alone has labels."""
    path = tiny_project(folder, recipe)
    decode, test = load_tokenizer(folder / "teacher").decode, tiny_corpus(folder, *ALL).test
    held_out = {decode(test[index].tolist()) for index in range(len(test))}
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    rows = [{**row, "label": row["label"] if row["text"] in held_out else None} for row in rows]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_model("bert", id2label=dict(enumerate(["mammal", "none", "swimmer"]))).save_pretrained(folder / "teacher")
    return path


CASES = {
    "the default arms": (UNTAUGHT, READY, "evaluation.arms (labels_only), evaluation.arms (majority)"),
    "a term": (RECIPE, [*READY, "evaluation.arms=[teacher, distilled]"], "losses.0 (match: labels)"),
    "all of them": (
        RECIPE,
        ALL,
        "teacher.fit, losses.0 (match: labels), evaluation.arms (labels_only), evaluation.arms (majority)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_needs_labels_is_named_once_the_data_are_read_and_before_anything_else(case, tmp_path, capsys):
    recipe, overrides, needed = CASES[case]
    path = unlabelled_project(tmp_path, recipe)
    assert main(["run", str(path), *overrides, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert f"no training example has a label, and these learn from labels: {needed}; " in said and "leave" in said
    assert [stamp.name for stamp in (tmp_path / "run/stages").iterdir()] == ["data.json"]


@pytest.mark.slow
def test_without_anything_that_needs_labels_the_whole_story_is_told(tmp_path):
    path, arms = unlabelled_project(tmp_path, UNTAUGHT), "evaluation.arms=[teacher, cut, distilled]"
    own = [*READY, arms, "evaluation.efficiency=false"]
    assert main(["run", str(path), *own, "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/release/model.safetensors").exists()

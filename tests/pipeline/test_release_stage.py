"""What the stage `release` says of the run: time and memory, what it replaces, and which texts stay with the run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import tiny_project

from distill.cli import main
from distill.pipeline import STORY, RunDir, Session
from distill.pipeline.release import STAGES, describe_difference, read_release, tabulate_disagreements
from distill.recipe import load_recipe

QUICK = ["evaluation.efficiency=false", "evaluation.arms=[teacher, distilled]"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of one finished run."""
    folder = tmp_path_factory.mktemp("released")
    recipe = tiny_project(folder)
    assert main(["run", str(recipe), *QUICK, "--out", str(folder / "run")]) == 0
    return folder


def session_of(folder):
    return Session(load_recipe(folder / "recipe.yaml", QUICK), folder, RunDir(folder / "run"), lambda _line: None)


def test_the_stages_before_the_release_are_those_of_the_story():
    assert [stage.name for stage in STORY] == [*STAGES, "release"]


def test_card_and_report_say_what_each_stage_took_and_how_many_tokens_were_seen(finished):
    card = (finished / "run/release/README.md").read_text()
    rows = [line for line in card[card.index("## Time and memory") :].split("## ")[1].splitlines() if "| " in line][2:]
    stages = [name for name in STAGES if (finished / f"run/stages/{name}.json").is_file()]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == stages and "train" in stages
    assert all(" s | " in row and row.endswith(("MB |", "GB |")) for row in rows)
    tokens = next(line for line in card.splitlines() if line.startswith("| tokens |") and line.count("|") == 3)
    arms = json.loads((finished / "run/evaluation.json").read_text())["arms"]
    assert str(next(arm["tokens"] for arm in arms if arm["name"] == "distilled")) in tokens
    assert "Fit of the teacher" in (finished / "run/report.html").read_text()


def test_examples_on_which_teacher_and_student_disagree_are_in_the_report_of_the_run_alone(finished, tmp_path):
    session = session_of(finished)
    path = finished / "run/predictions/distilled.safetensors"
    columns, before = load_file(path), path.read_bytes()
    classes = session.corpus.classes
    columns["predictions"] = columns["predictions"].copy()
    columns["predictions"][:2] = (load_file(path.with_name("teacher.safetensors"))["predictions"][:2] + 1) % len(
        classes
    )
    try:
        save_file(columns, path)
        table = tabulate_disagreements(session)
    finally:
        path.write_bytes(before)
    changed = np.flatnonzero(columns["predictions"] != load_file(path.with_name("teacher.safetensors"))["predictions"])
    assert len(table.rows) == len(changed) and len(changed) >= 2
    texts = {json.loads(line)["text"] for line in (finished / "data.jsonl").read_text().splitlines()}
    assert {row[0] for row in table.rows} <= texts and all("%" in row[2] and "%" in row[3] for row in table.rows)
    released = (finished / "run/release/report.html").read_text()
    assert not [text for text in texts if text in released and len(text.split()) > 4]


def test_a_release_says_what_it_changes_against_the_one_that_it_replaces(finished, capsys):
    before = read_release(finished / "run/release")
    command = ["run", str(finished / "recipe.yaml"), *QUICK, "training.steps=14", "--out", str(finished / "run")]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "it replaces a release: training.steps: 12 → 14; accuracy " in said
    assert describe_difference(before, before).startswith("the same recipe; accuracy ")
    assert read_release(finished) is None

"""The stage `examine`."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import tiny_project

from distill.errors import InputError
from distill.evaluation.chance import label_counts, weakness
from distill.pipeline import RunDir, Session, data, examine, run_stages, teacher
from distill.recipe import load_recipe


def session_of(folder, *overrides, **flags):
    lines = []
    return Session(
        load_recipe(folder / "recipe.yaml", overrides), folder, RunDir(folder / "run"), lines.append, **flags
    ), lines


def test_chance_is_guessing_evenly_or_knowing_how_frequent_each_class_is():
    counts = torch.tensor([6, 2, 0])
    prior = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))  # 0.5623
    assert not weakness({"loss": prior - 0.01, "accuracy": 0.1}, counts, 3)
    assert not weakness({"loss": 5.0, "accuracy": 0.76}, counts, 3)  # too sure of itself, and right more often
    assert "75.0%" in weakness({"loss": prior, "accuracy": 0.75}, counts, 3)
    assert "guessing among all 3" in weakness({"loss": math.log(3), "accuracy": 0.75}, counts, 3)
    assert weakness({"loss": math.nan, "accuracy": 0.75}, counts, 3)


def test_labels_are_counted_where_there_are_any():
    batch = {"labels": torch.tensor([[5, 1, 1, 2], [5, 1, -100, -100]])}
    batch["attention_mask"] = (batch["labels"] != -100).long()
    assert label_counts([batch, batch], "next_token").tolist() == [0, 6, 2]  # the first token is not predicted
    assert label_counts([{**batch, "labels": torch.tensor([2, -100])}], "sequence").tolist() == [0, 0, 1]


def test_a_teacher_that_is_no_better_than_chance_is_refused_before_it_teaches(tmp_path):
    tiny_project(tmp_path)
    stages = [data.STAGE, teacher.STAGE, examine.STAGE]
    weak = ["teacher.fit.steps=1", "teacher.fit.lr=1e-9"]
    session, lines = session_of(tmp_path, *weak)
    run_stages(session, stages)
    assert any("too few to be sure" in line for line in lines)
    weak += ["data.test_share=0.7", "training.evaluate_every=0"]
    session, lines = session_of(tmp_path, *weak)
    with pytest.raises(InputError, match=r"no better than chance.*--accept-weak-teacher"):
        run_stages(session, stages)
    assert any("the teacher on" in line and "accuracy" in line for line in lines)
    session, lines = session_of(tmp_path, *weak, accept_weak_teacher=True)
    run_stages(session, stages)
    assert any("going on, as asked" in line for line in lines)
    assert json.loads(session.folder.examined.read_text())["weakness"]
    session, lines = session_of(tmp_path, "teacher.fit.steps=60", "data.labelled=null")
    run_stages(session, stages)
    found = json.loads(session.folder.examined.read_text())
    assert found["weakness"] == "" and found["metrics"]["accuracy"] > 0.6

"""Arms are rows: the table, the schema and the table of evaluation.json say the same."""

from __future__ import annotations

from typing import get_args

import numpy as np
from tiny import tiny_project

from distill.evaluation.arms import ARMS, controls, rivals
from distill.evaluation.table import retain, tabulate
from distill.recipe import load_recipe
from distill.recipe.schema import Arm, Evaluation


def test_the_schema_knows_the_rows_and_measures_all_of_them_by_default():
    assert tuple(ARMS) == get_args(Arm) == tuple(Evaluation().arms)


def test_a_repaired_rival_is_named_only_where_something_is_repaired(tmp_path):
    recipe = load_recipe(tiny_project(tmp_path))
    assert list(rivals(recipe)) == ["labels_only", "cut"] and controls(recipe) == ["labels_only"]
    repaired = load_recipe(tmp_path / "recipe.yaml", ["student.repair.refit=true", "evaluation.arms=[distilled]"])
    assert list(rivals(repaired)) == ["labels_only", "cut", "repaired"] and controls(repaired) == []


def rows(hits, nll):
    return {"correct": np.array(hits), "tokens": np.array([1, 1]), "nll": np.array(nll)}


def test_a_table_has_the_steps_of_trained_arms_and_what_each_keeps_of_the_teacher_where_more_is_better():
    measured = {"teacher": rows([1, 1], [1.0, 1.0]), "labels_only": rows([1, 0], [1.0, 3.0])}
    teacher, control = tabulate(measured, ["token_accuracy", "loss"], 7)["arms"]
    assert (teacher["steps"], control["steps"]) == (0, 7)
    assert control["title"] == ARMS["labels_only"].title
    assert control["metrics"] == {"token_accuracy": 0.5, "loss": 2.0} and control["retained"] == {"token_accuracy": 0.5}
    (alone,) = tabulate({"cut": measured["labels_only"]}, ["loss"], 7)["arms"]
    assert alone["retained"] == {} and alone["steps"] == 0


def test_a_value_that_json_cannot_hold_is_none_and_keeps_no_share():
    broken = rows([0, 0], [np.inf, 1.0])
    (cut,) = tabulate({"cut": broken}, ["loss", "perplexity"], 1)["arms"]
    assert cut["metrics"] == {"loss": None, "perplexity": None}
    assert retain({"accuracy": None}, {"accuracy": 0.8}) == retain({"accuracy": 0.5}, {"accuracy": 0.0}) == {}

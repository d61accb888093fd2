"""Arms are rows: the table, the schema and the table of evaluation.json say the same."""

from __future__ import annotations

from typing import get_args

import numpy as np
from tiny import tiny_project

from distill.evaluation.arms import ARMS, controls, lessons, not_run, rivals, title_of
from distill.evaluation.table import retain, spread_over, tabulate
from distill.recipe import load_recipe
from distill.recipe.controls import Controls
from distill.recipe.schema import Arm, Evaluation


def test_the_schema_knows_the_rows_and_measures_by_default_all_but_those_that_cost_a_second_distillation():
    named = tuple(arm for arm in ARMS if arm != "teachers")  # measured beside `teacher`, without being named
    assert named == get_args(Arm) == (*Evaluation().arms, "random_cut", "from_scratch")
    assert {*Controls.model_fields} == {name for name, arm in ARMS.items() if arm.terms} - {"distilled"}
    assert [name for name, arm in ARMS.items() if not arm.lesson] == ["teacher", "teachers", "distilled"]


def test_words_for_a_student_that_was_given_do_not_speak_of_a_cut(tmp_path):
    recipe = load_recipe(tiny_project(tmp_path))
    assert title_of(recipe, "cut") == "cut (the student before training)" and title_of(recipe, "teacher") == "teacher"
    given = recipe.model_copy(update={"student": recipe.student.model_copy(update={"from_": "./small"})})
    assert title_of(given, "cut").startswith("cut (nothing was cut")


def test_rivals_are_the_measured_arms_and_what_is_left_out_is_named_where_it_could_be_had(tmp_path):
    recipe = load_recipe(tiny_project(tmp_path))
    assert list(rivals(recipe)) == ["labels_only", "cut", "majority"] == list(lessons(recipe))
    assert controls(recipe) == ["labels_only"] and list(not_run(recipe)) == ["random_cut", "from_scratch"]
    repaired = load_recipe(tmp_path / "recipe.yaml", ["student.repair.refit=true", "evaluation.arms=[distilled, cut]"])
    assert list(rivals(repaired)) == ["cut"] and controls(repaired) == []
    left = ["teacher", "repaired", "labels_only", "majority", "random_cut", "from_scratch"]
    assert list(not_run(repaired)) == left
    assert not_run(repaired)["random_cut"].startswith("random layers and neurons")


def rows(hits, nll):
    return {"correct": np.array(hits), "tokens": np.array([1, 1]), "nll": np.array(nll)}


def test_a_table_has_the_steps_of_trained_arms_and_what_each_keeps_of_the_teachers_lead_over_the_majority():
    measured = {"teacher": rows([1, 1], [1.0, 1.0]), "labels_only": rows([1, 0], [1.0, 3.0])}
    titles = {"labels_only": "labels_only (in words)"}
    teacher, control = tabulate(measured, ["token_accuracy", "loss"], 7, titles=titles)["arms"]
    assert (teacher["steps"], control["steps"]) == (0, 7)
    assert control["title"] == "labels_only (in words)" and teacher["title"] == "teacher"
    assert control["metrics"] == {"token_accuracy": 0.5, "loss": 2.0}
    assert control["retained"] == teacher["retained"] == {}  # half of two classes may be nothing at all
    measured["majority"] = rows([0, 0.25], [2.0, 2.0])
    _, control, chance = tabulate(measured, ["token_accuracy", "loss"], 7)["arms"]
    assert control["retained"] == {"token_accuracy": (0.5 - 0.125) / (1 - 0.125)}
    assert chance["retained"] == {"token_accuracy": 0} and chance["steps"] == 0
    (alone,) = tabulate({"cut": measured["labels_only"]}, ["loss"], 7)["arms"]
    assert alone["retained"] == {} and alone["steps"] == 0


def test_a_value_that_json_cannot_hold_is_none_and_keeps_no_share():
    broken = rows([0, 0], [np.inf, 1.0])
    (cut,) = tabulate({"cut": broken}, ["loss", "perplexity"], 1)["arms"]
    assert cut["metrics"] == {"loss": None, "perplexity": None}
    none = {"accuracy": None}
    assert retain(none, {"accuracy": 0.8}, {"accuracy": 0.5}) == {}
    assert retain({"accuracy": 0.5}, {"accuracy": 0.4}, {"accuracy": 0.4}) == {}  # the teacher has no lead
    assert retain({"accuracy": 0.5}, {"accuracy": 0.8}, none) == retain({"accuracy": 0.5}, {"accuracy": 0.8}, {}) == {}


def test_seeds_are_summarised_by_mean_and_range_and_one_that_failed_leaves_no_mean():
    def table(accuracy, loss):
        return [{"name": "distilled", "metrics": {"accuracy": accuracy, "loss": loss}}]

    tables = [[*table(0.5, 1.0), {"name": "cut", "metrics": {}}], table(0.75, None), table(0.25, 2.0)]
    assert spread_over(tables) == {
        "distilled": {
            "accuracy": {"values": [0.5, 0.75, 0.25], "mean": 0.5, "min": 0.25, "max": 0.75},
            "loss": {"values": [1.0, None, 2.0], "mean": None, "min": None, "max": None},
        }
    }

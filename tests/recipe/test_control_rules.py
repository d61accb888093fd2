"""What a recipe may not say of its control arms, each with the key and the fix."""

from __future__ import annotations

import pytest
from tiny import RECIPE, tiny_project

from distill.errors import RecipeError
from distill.evaluation.arms import searches, tries_of
from distill.recipe import load_recipe
from distill.recipe.controls import Control

ALL = "evaluation.arms=[teacher, distilled, labels_only, random_cut, from_scratch]"
WRONG = {
    "settings of an arm that is not measured": (
        ["evaluation.controls.random_cut.lr=1e-4"],
        "evaluation.controls.random_cut: has no effect: random_cut is not in arms",
    ),
    "two lengths": (
        ["evaluation.controls.labels_only={steps: 3, epochs: 1}"],
        "evaluation.controls.labels_only.epochs: steps and epochs are both given",
    ),
    "a rate beside rates to try": (
        ["evaluation.controls.labels_only={lr: 1e-3, grid: {lr: [1e-4, 1e-3]}}"],
        "evaluation.controls.labels_only.lr: has no effect beside the grid's own values",
    ),
    "epochs beside steps to try": (
        ["evaluation.controls.labels_only={epochs: 2, grid: {steps: [1, 2]}}"],
        "evaluation.controls.labels_only.epochs: has no effect beside the grid's own values",
    ),
    "one value to choose from": (
        ["evaluation.controls.labels_only.grid={lr: [1e-3]}"],
        "evaluation.controls.labels_only.grid: there is nothing to choose from",
    ),
    "a value twice": (
        ["evaluation.controls.labels_only.grid={steps: [2, 2]}"],
        "evaluation.controls.labels_only.grid.steps.1: 2 is listed twice",
    ),
    "a warmup longer than the control": (
        ["training={steps: 12, warmup: 5}", "evaluation.controls.labels_only.steps=3"],
        "evaluation.controls.labels_only: training.warmup of 5 steps is longer than 3 steps",
    ),
    "random weights that are frozen": (
        [ALL, 'training.freeze=["*.embeddings.*"]'],
        "evaluation.arms.4: with training.freeze its random weights would not learn",
    ),
    "adapters on random weights": (
        [ALL, "training.lora={rank: 2}"],
        "evaluation.arms.4: with training.lora its random weights would not learn",
    ),
    "seeds without what they change": (
        ["evaluation.arms=[teacher, cut]", "evaluation.seeds=2"],
        "evaluation.seeds: has no effect: distilled is not in arms",
    ),
    "a majority of texts": (
        ["evaluation.arms=[distilled, majority]", "data.task=seq2seq", "data.labelled=null"],
        "evaluation.arms.1: no answer is the most frequent one in task: seq2seq",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_controls_may_not_be_is_refused_with_its_key(case, tmp_path):
    overrides, words = WRONG[case]
    with pytest.raises(RecipeError) as refused:
        load_recipe(tiny_project(tmp_path, RECIPE), overrides)
    assert words in str(refused.value).replace("`", "")


def test_a_grid_gives_every_combination_beside_what_is_fixed():
    own = Control.model_validate({"lr": 0.1, "grid": {"steps": [2, 4]}})
    assert own.tries == [{"lr": 0.1, "steps": 2}, {"lr": 0.1, "steps": 4}]
    both = Control.model_validate({"epochs": 2, "grid": {"lr": [0.1, 0.2]}})
    assert both.tries == [{"epochs": 2, "lr": 0.1}, {"epochs": 2, "lr": 0.2}]
    crossed = Control.model_validate({"grid": {"lr": [0.1, 0.2], "steps": [2, 4]}})
    assert [tuple(each.values()) for each in crossed.tries] == [(0.1, 2), (0.1, 4), (0.2, 2), (0.2, 4)]
    assert Control().tries == [{}]


def test_only_a_grid_of_a_measured_arm_searches(tmp_path):
    path = tiny_project(tmp_path)
    one = load_recipe(path, ["evaluation.controls.labels_only.lr=1e-2"])
    assert not searches(one) and tries_of(one, "labels_only") == [{"lr": 0.01}] and tries_of(one, "distilled") == [{}]
    assert searches(load_recipe(path, ["evaluation.controls.labels_only.grid={lr: [1e-3, 1e-2]}"]))

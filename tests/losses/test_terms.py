"""The table of matches against what a recipe can say."""

from __future__ import annotations

from typing import get_args

import pytest
from tiny import RECIPE, tiny_project

from distill.errors import RecipeError
from distill.losses import MATCHES
from distill.recipe import load_recipe
from distill.recipe.schema import Term
from distill.recipe.terms import TERM_KEYS

CHANGED = {
    "loss": "my_losses:huber",
    "params": "{delta: 1.0}",
    "temperature": "2.0",
    "scale_by_temperature": "false",
    "map": "last",
}


def test_a_recipe_can_name_every_match():
    assert list(get_args(Term.model_fields["match"].annotation)) == list(MATCHES)


@pytest.mark.parametrize("match", MATCHES)
def test_a_recipe_accepts_the_keys_that_a_match_uses_and_no_others(match, tmp_path):
    keys = ", ".join(f"{key}: {value}" for key, value in CHANGED.items())
    recipe = tiny_project(tmp_path, RECIPE.replace("{match: labels, weight: 0.3}", f"{{match: {match}, {keys}}}"))
    with pytest.raises(RecipeError) as found:
        load_recipe(recipe)
    unused = {key for key in CHANGED if f"losses.0.{key}: " in str(found.value)}
    assert unused == CHANGED.keys() - set(TERM_KEYS[match].keys)

"""Zeros in the MLPs that stay zero through training, as the recipe's `student.mask` asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distill.models.trainable import freeze
from distill.recipe.schema import Recipe
from distill.student.masks.compact import compact
from distill.student.masks.masks import Masks
from distill.student.masks.sparsity import tabulate_sparsity


def masks_for(recipe: Recipe, model: Any, steps: int) -> Masks | None:
    """Make the masks of a training of the student that lasts so many steps; None when the recipe has none.

    Frozen parameters, which masks leave alone, must be set already.

    Raises:
        InputError: A name pattern of the mask matches nothing.
    """
    return None if recipe.student.mask is None else Masks(model, recipe.student.mask, steps)


def mask_untrained(recipe: Recipe, model: Any, steps: int) -> None:
    """Mask a student as its training would before the first step: what an arm that is not trained has to be."""
    if recipe.student.mask is not None:
        freeze(model, recipe.training.freeze, recipe.training.only)
        Masks(model, recipe.student.mask, steps).after_step(0)


def compact_trained(recipe: Recipe, model: Any, say: Callable[[str], None]) -> None:
    """Remove dead neurons from a trained student, where the recipe says so."""
    spec = recipe.student.mask
    if spec is not None and spec.compact:
        gone = compact(model, uniform=spec.compact == "uniform", multiple_of=recipe.student.mlp.multiple_of)
        say(f"  compact: {gone} neurons without effect are taken out")


def sparsity_table(recipe: Recipe, model: Any) -> dict[str, Any] | None:
    """Tabulate the zeros of a student's MLPs; None without a mask."""
    return tabulate_sparsity(model) if recipe.student.mask else None


def mask_settings(recipe: Recipe) -> dict[str, Any] | None:
    """Select the keys of the recipe that decide which weights a training masks; None without a mask."""
    mask = recipe.student.mask
    # `multiple_of` says how far `compact` may go.
    return {**mask.model_dump(mode="json"), "multiple_of": recipe.student.mlp.multiple_of} if mask else None

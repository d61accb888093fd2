"""Arms of the evaluation, one row each: everything else that speaks of arms reads these rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from distill.recipe.names import TWO_STACK_TASKS
from distill.recipe.schema import Recipe, Term
from distill.student.masks import mask_untrained

LABELS_ONLY = (Term(match="labels"),)


def _unchanged(_recipe: Recipe, model: Any, _steps: int) -> Any:
    return model


def _masked(recipe: Recipe, model: Any, steps: int) -> Any:
    mask_untrained(recipe, model, steps)
    return model


@dataclass(frozen=True)
class Arm:
    """A model that is measured: its origin, its loss, and the words for it."""

    title: str
    """Words for tables."""
    start: Literal["teacher", "cut", "repaired", "student"]
    """The model it starts from; `student` is the one that training starts from: repaired where the recipe asks for
    it, else as cut."""
    terms: Callable[[Recipe], Sequence[Term]] | None = None
    """The loss that it is trained on, for as many steps as `distilled`; None: it is not trained."""
    prepare: Callable[[Recipe, Any, int], Any] = _unchanged
    """(recipe, start model, steps of the training) -> the model that is trained, or measured if nothing is."""
    rival: str = ""
    """Words for it as what the distilled student has to beat; empty: it is no rival."""


ARMS: dict[str, Arm] = {
    "teacher": Arm("teacher", "teacher"),
    "teachers": Arm("teachers (the mixture that taught)", "teacher"),
    "cut": Arm("cut (student before training)", "cut", prepare=_masked, rival="the student before training"),
    "repaired": Arm(
        "repaired (cut student after repair, before training)",
        "repaired",
        prepare=_masked,
        rival="the student after its repair, before training",
    ),
    "distilled": Arm("distilled (this model)", "student", terms=lambda recipe: recipe.losses),
    "labels_only": Arm(
        "labels_only (same student, no teacher)",
        "student",
        terms=lambda _recipe: LABELS_ONLY,
        rival="the same student trained for the same steps without the teacher",
    ),
}


def arms_of(recipe: Recipe) -> dict[str, Arm]:
    """Return the rows in the words of a recipe, whose student may have been given instead of cut."""
    if recipe.student.given is None:
        return ARMS
    words = "the student as given, before training"
    return {**ARMS, "cut": replace(ARMS["cut"], title=f"cut (nothing was cut: {words})", rival=words)}


def _is_made(recipe: Recipe, arm: str) -> bool:
    if arm == "labels_only" and recipe.data.task == "embedding" and not recipe.data.learns_from_pairs:
        return False
    if arm == "teachers":  # what a task observes of texts is written by one model
        return recipe.mixes and recipe.data.task not in TWO_STACK_TASKS
    return ARMS[arm].start != "repaired" or recipe.student.repair.wanted


def measured_arms(recipe: Recipe) -> list[str]:
    """List the arms that a recipe measures, of those that it makes."""
    own = recipe.evaluation.arms
    beside = [each for arm in own for each in ((arm, "teachers") if arm == "teacher" else (arm,))]
    return [arm for arm in beside if _is_made(recipe, arm)]


def controls(recipe: Recipe) -> list[str]:
    """List the arms of a recipe that are trained beside `distilled`."""
    return [arm for arm in measured_arms(recipe) if ARMS[arm].terms is not None and arm != "distilled"]


def rivals(recipe: Recipe) -> dict[str, str]:
    """Map each arm that the distilled student has to beat to its words, trained ones first; also those not measured."""
    made = [name for name, arm in ARMS.items() if arm.rival and _is_made(recipe, name)]
    return {name: arms_of(recipe)[name].rival for name in sorted(made, key=lambda name: ARMS[name].terms is None)}

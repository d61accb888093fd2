"""Arms of the evaluation, one row each: everything else that speaks of arms reads these rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
    """A model that is measured: where it comes from, what it learns from, and the words for it."""

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
    """What the distilled student has to beat by it, in words; empty: nothing."""


ARMS: dict[str, Arm] = {
    "teacher": Arm("teacher", "teacher"),
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


def controls(recipe: Recipe) -> list[str]:
    """List the arms of a recipe that are trained beside `distilled`."""
    return [arm for arm in recipe.evaluation.arms if ARMS[arm].terms is not None and arm != "distilled"]


def rivals(recipe: Recipe) -> dict[str, str]:
    """Map each arm that the distilled student has to beat to its words, trained ones first; also those not measured."""
    made = {name: arm for name, arm in ARMS.items() if arm.start != "repaired" or recipe.student.repair.wanted}
    ordered = sorted(made, key=lambda name: made[name].terms is None)
    return {name: made[name].rival for name in ordered if made[name].rival}

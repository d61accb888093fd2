"""Arms of the evaluation, one row each: everything else that speaks of arms reads these rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distill.data import TASKS
from distill.evaluation.chance import DEFINED
from distill.recipe.names import TWO_STACK_TASKS
from distill.recipe.schema import Recipe, Term
from distill.registry import find

LABELS_ONLY = (Term(match="labels"),)


@dataclass(frozen=True)
class Arm:
    """A model that is measured: its origin, its loss, and the words for it."""

    words: str
    """What it is; empty where its name says it."""
    start: Literal["teacher", "cut", "repaired", "student", "own", "none"]
    """The model it starts from; `student` is the one that training starts from: repaired where the recipe asks for
    it, else as cut. `own`: one that the stage `draw` makes for it; `none`: there is no model."""
    terms: Literal["recipe", "labels"] | None = None
    """The loss that it is trained on: the recipe's, or the labels alone; None: it is not trained."""
    lesson: str = ""
    """What it means where the distilled student does not beat it; empty: it is no rival."""


UNTRAINED = "training it added nothing"
NO_CHOICE = "the choice of layers and neurons by their scores is worth nothing here"
NO_WEIGHTS = "the weights that were cut from the teacher are worth nothing here"
ARMS: dict[str, Arm] = {
    "teacher": Arm("", "teacher"),
    "teachers": Arm("the mixture that taught", "teacher"),
    "cut": Arm("the student before training", "cut", lesson=UNTRAINED),
    "repaired": Arm("the student after its repair, before training", "repaired", lesson=UNTRAINED),
    "distilled": Arm("this model", "student", "recipe"),
    "labels_only": Arm("the same student without the teacher", "student", "labels", lesson="the teacher added nothing"),
    "majority": Arm("the most frequent label of the training data", "none", lesson="it has learnt nothing that helps"),
    "random_cut": Arm("random layers and neurons, as many, trained alike", "own", "recipe", lesson=NO_CHOICE),
    "from_scratch": Arm("the same student with random weights, trained alike", "own", "recipe", lesson=NO_WEIGHTS),
}


def describe_arm(recipe: Recipe, arm: str) -> str:
    """Say what an arm is; the student of a recipe may have been given instead of cut."""
    if arm == "cut" and recipe.student.given is not None:
        return "nothing was cut: the student as given, before training"
    return ARMS[arm].words


def title_of(recipe: Recipe, arm: str) -> str:
    """Return the words for an arm in tables."""
    words = describe_arm(recipe, arm)
    return f"{arm} ({words})" if words else arm


def _why_not(recipe: Recipe, arm: str) -> str:
    """Say why a recipe cannot have an arm; empty where it can."""
    task = find(TASKS, recipe.data.task, "task")()
    if arm == "labels_only" and recipe.data.task == "embedding" and not recipe.data.learns_from_pairs:
        return "the texts have no labels"
    # What a task observes slowly, it has the model write; there is no model here.
    if arm == "majority" and (task.head not in DEFINED or (task.observed and not task.observed_in_training)):
        return f"no answer is the most frequent one in task: {recipe.data.task}"
    if arm == "teachers" and not (recipe.mixes and recipe.data.task not in TWO_STACK_TASKS):
        return "one model teaches" if not recipe.mixes else "what a task observes of texts is written by one model"
    if arm == "random_cut" and recipe.student.given is not None:
        return "nothing was cut"
    return "nothing is repaired" if ARMS[arm].start == "repaired" and not recipe.student.repair.wanted else ""


def measured_arms(recipe: Recipe) -> list[str]:
    """List the arms that a recipe measures, of those that it makes."""
    own = recipe.evaluation.arms
    beside = [each for arm in own for each in ((arm, "teachers") if arm == "teacher" else (arm,))]
    return [arm for arm in beside if not _why_not(recipe, arm)]


def not_run(recipe: Recipe) -> dict[str, str]:
    """Map each arm that a recipe could have and does not measure to its words, or to why it cannot be had."""
    hidden = [arm for arm in ("repaired", "teachers") if _why_not(recipe, arm)]
    left = [arm for arm in ARMS if arm not in measured_arms(recipe) and arm not in hidden]
    return {arm: _why_not(recipe, arm) or describe_arm(recipe, arm) for arm in left}


def terms_of(recipe: Recipe, arm: str) -> Sequence[Term]:
    """Return the loss of a trained arm."""
    assert ARMS[arm].terms is not None, f"{arm} is not trained"
    return recipe.losses if ARMS[arm].terms == "recipe" else LABELS_ONLY


def trained_arms(recipe: Recipe) -> list[str]:
    """List the arms of a recipe that are trained, `distilled` first, which always is."""
    return ["distilled", *controls(recipe)]


def controls(recipe: Recipe) -> list[str]:
    """List the arms of a recipe that are trained beside `distilled`."""
    return [arm for arm in measured_arms(recipe) if ARMS[arm].terms is not None and arm != "distilled"]


def drawn_arms(recipe: Recipe) -> list[str]:
    """List the arms of a recipe that start from a model drawn at random."""
    return [arm for arm in measured_arms(recipe) if ARMS[arm].start == "own"]


def tries_of(recipe: Recipe, arm: str) -> list[dict[str, Any]]:
    """List the settings that an arm is trained with, as what differs from `training`; of several the best is kept."""
    own = getattr(recipe.evaluation.controls, arm, None)
    return [{}] if own is None else own.tries


def searches(recipe: Recipe) -> bool:
    """Tell whether settings of a control are chosen by the validation split."""
    return any(len(tries_of(recipe, arm)) > 1 for arm in controls(recipe))


def rivals(recipe: Recipe) -> dict[str, str]:
    """Map each measured arm that the distilled student has to beat to its words, trained ones first."""
    measured = [name for name in ARMS if ARMS[name].lesson and name in measured_arms(recipe)]
    ordered = sorted(measured, key=lambda name: ARMS[name].terms is None)
    return {name: describe_arm(recipe, name).removeprefix("nothing was cut: ") for name in ordered}


def lessons(recipe: Recipe) -> dict[str, str]:
    """Map each rival to what it means where it is not beaten."""
    return {name: ARMS[name].lesson for name in rivals(recipe)}

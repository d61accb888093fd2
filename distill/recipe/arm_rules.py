"""The rules by which every arm that a recipe asks for can be had."""

from __future__ import annotations

from collections.abc import Iterator

from distill.recipe.fields import KeyPath, Mistake
from distill.recipe.sections import Arm, Evaluation, Training
from distill.recipe.student import Repair


def path_of_arm(evaluation: Evaluation, arm: Arm) -> KeyPath | None:
    """Return the path of an arm that the recipe itself lists; None where it does not."""
    asked = evaluation.changed("arms") and arm in evaluation.arms
    return ("evaluation", "arms", evaluation.arms.index(arm)) if asked else None


def another_cut_is_made_where_one_is(given: str | None, evaluation: Evaluation) -> Iterator[Mistake]:
    """Refuse the arm `random_cut` where the student was given."""
    path = path_of_arm(evaluation, "random_cut")
    if path and given is not None:
        yield Mistake(path, "the student is given, and nothing is cut", "remove it")


def repaired_arm_is_repaired(repair: Repair, evaluation: Evaluation) -> Iterator[Mistake]:
    """Refuse the arm `repaired` where nothing is repaired."""
    path = path_of_arm(evaluation, "repaired")
    if path and not repair.wanted:
        yield Mistake(path, "nothing is repaired", "remove it, or ask for student.repair")


def controls_can_learn(training: Training, evaluation: Evaluation) -> Iterator[Mistake]:
    """Refuse random weights that do not learn, and a control's warmup that is longer than its training."""
    path, fixed = path_of_arm(evaluation, "from_scratch"), training.changed("lora", "freeze", "only")
    if path and fixed:
        yield Mistake(path, f"with training.{fixed[0]} its random weights would not learn", "remove one of them")
    for arm in evaluation.controls.changed(*type(evaluation.controls).model_fields):
        for own in getattr(evaluation.controls, arm).tries:
            if training.warmup > own.get("steps", training.warmup):
                message = f"training.warmup of {training.warmup:g} steps is longer than {own['steps']} steps"
                yield Mistake(("evaluation", "controls", arm), message, "give more steps, or a warmup below 1")
                break

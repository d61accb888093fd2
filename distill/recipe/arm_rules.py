"""The rules by which every arm that a recipe asks for can be had."""

from __future__ import annotations

from collections.abc import Iterator

from distill.recipe.fields import KeyPath, Mistake
from distill.recipe.sections import Evaluation, Training
from distill.recipe.student import Repair


def another_cut_is_made_where_one_is(given: str | None, evaluation: Evaluation) -> Iterator[Mistake]:
    """Refuse the arm `random_cut` where the student was given."""
    if "random_cut" in evaluation.arms and given is not None:
        path: KeyPath = ("evaluation", "arms", evaluation.arms.index("random_cut"))
        yield Mistake(path, "the student is given, and nothing is cut", "remove it")


def repaired_arm_is_repaired(repair: Repair, evaluation: Evaluation) -> Iterator[Mistake]:
    """Refuse the arm `repaired` where nothing is repaired."""
    if evaluation.changed("arms") and "repaired" in evaluation.arms and not repair.wanted:
        path: KeyPath = ("evaluation", "arms", evaluation.arms.index("repaired"))
        yield Mistake(path, "nothing is repaired", "remove it, or ask for student.repair")


def controls_can_learn(training: Training, evaluation: Evaluation) -> Iterator[Mistake]:
    """Refuse random weights that do not learn, and a control's warmup that is longer than its training."""
    fixed = training.changed("lora", "freeze", "only")
    if "from_scratch" in evaluation.arms and fixed:
        path: KeyPath = ("evaluation", "arms", evaluation.arms.index("from_scratch"))
        yield Mistake(path, f"with training.{fixed[0]} its random weights would not learn", "remove one of them")
    for arm in evaluation.controls.changed(*type(evaluation.controls).model_fields):
        for own in getattr(evaluation.controls, arm).tries:
            if training.warmup > own.get("steps", training.warmup):
                message = f"training.warmup of {training.warmup:g} steps is longer than {own['steps']} steps"
                yield Mistake(("evaluation", "controls", arm), message, "give more steps, or a warmup below 1")
                break

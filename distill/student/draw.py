"""Students that nobody chose, of the same sizes as a planned one: random layers and neurons, and random weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distill.errors import InputError
from distill.models.family import layers_of, layout_of, protected_layers
from distill.models.layout import INDEX_FLAGS, StackName
from distill.models.plan import StudentPlan
from distill.models.widths import axes_of, inherit, is_unequal, set_sizes
from distill.recipe.schema import Layers, Student
from distill.student.build import build_student
from distill.student.layers import random
from distill.student.plan import plan_student

DRAWS = 100
"""Draws that may fail, or give what was planned, before there is none."""
ENCODER = 500_000
"""Added to the seed for the layers of an encoder, so that they are not those of its decoder."""


def exact_plan(
    model: Any, kept: Mapping[StackName, list[int]], widths: float | list[int] = 1.0, seed: int = 0
) -> StudentPlan:
    """Plan a student of these layers of each stack and of these widths, an encoder's first; neurons are drawn."""
    mlp = {"keep": widths, "multiple_of": 1, "score": "random", "params": {"seed": seed}}
    names = {"main": "layers", "encoder": "encoder_layers"}
    layers = {names[side]: {"keep": own} for side, own in kept.items()}
    return plan_student(model, Student.model_validate({**layers, "mlp": mlp}))


def draw_plan(model: Any, plan: StudentPlan, spec: Student, seed: int) -> StudentPlan:
    """Plan a student with as many layers as another and, layer by layer, as many neurons, both drawn at random.

    Layers stay that the family or the recipe protects; where layers depend on their index, those of the plan stay.

    Args:
        model: The teacher.
        plan: Has the sizes.
        spec: The recipe's `student` section.
        seed: Decides the draw.

    Raises:
        InputError: No draw differs from the plan, or none has layers of its sizes.
    """
    sides, fixed = layout_of(model).sides, any(getattr(model.config, flag, False) for flag in INDEX_FLAGS)
    asked: dict[StackName, Layers | None] = {"main": spec.layers, "encoder": spec.encoder_layers}
    free = {side: own for side, own in asked.items() if side in sides and own is not None and not fixed}
    kept = {side: _kept(plan, side) for side in sides}
    widths = [layer.width for side in sides for layer in plan.stack(side)]
    for draw in range(seed * DRAWS, (seed + 1) * DRAWS):
        for side, own in free.items():
            stay, depth = protected_layers(model, side, own), len(layers_of(model, side))
            own_seed = draw + (ENCODER if side == "encoder" else 0)
            kept[side] = random(depth, len(kept[side]), None, protected=stay, seed=own_seed)
        if any(_sizes(model, side, kept[side]) != _sizes(model, side, _kept(plan, side)) for side in sides):
            continue
        drawn = exact_plan(model, kept, widths, draw)
        if any(drawn.stack(side) != plan.stack(side) for side in sides):
            return drawn.model_copy(update={"layer_policy": "random"})
    raise InputError(
        "evaluation.arms: random_cut: no student with other layers or neurons has the sizes of this one; leave it out"
    )


def _kept(plan: StudentPlan, side: StackName) -> list[int]:
    return [layer.teacher_layer for layer in plan.stack(side)]


def _sizes(model: Any, side: StackName, kept: Sequence[int]) -> list[dict[str, torch.Size]]:
    """List the shapes of the tensors in some of a teacher's layers: some have experts in some layers only."""
    layers, once = layers_of(model, side), layout_of(model).stack(side).first_only
    return [{name: own.shape for name, own in layers[at].named_parameters() if name not in once} for at in kept]


def draw_weights(student: Any, seed: int) -> Any:
    """Make a model of a student's class, sizes and dtype, on the CPU, with weights drawn as the class does it."""
    config = copy.deepcopy(student.config)
    set_sizes(config, [])
    torch.manual_seed(seed)
    fresh = type(student)._from_config(config, dtype=student.dtype).eval()
    inherit(fresh, student)
    if not is_unequal(student.config):
        return fresh
    every: dict[StackName, list[int]]
    every = {side: list(range(len(layers_of(student, side)))) for side in layout_of(student).sides}
    return build_student(fresh, exact_plan(fresh, every, [axis.units for _, _, axis in axes_of(student)]))

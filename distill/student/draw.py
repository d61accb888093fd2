"""Students that nobody chose, of the same sizes as a planned one: random layers and neurons, and random weights."""

from __future__ import annotations

import copy
from typing import Any

import torch

from distill.errors import InputError
from distill.models.family import layers_of, layout_of
from distill.models.layout import INDEX_FLAGS, StackName
from distill.models.plan import StudentPlan
from distill.models.widths import axes_of, is_unequal, set_sizes
from distill.recipe.schema import Layers, Student
from distill.student.build import build_student
from distill.student.plan import plan_student

DRAWS = 100
"""Draws that may fail, or give what was planned, before there is none."""
ENCODER = 500_000
"""Added to the seed for the layers of an encoder, so that they are not those of its decoder."""


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
    sides, asked = layout_of(model).sides, {"main": spec.layers, "encoder": spec.encoder_layers}
    fixed, refused = any(getattr(model.config, flag, False) for flag in INDEX_FLAGS), ""
    widths = [layer.width for side in sides for layer in plan.stack(side)]
    for draw in range(seed * DRAWS, (seed + 1) * DRAWS):
        layers = {}
        for side in sides:
            kept, own = [layer.teacher_layer for layer in plan.stack(side)], asked[side]
            random = {"keep": len(kept), "choose": "random", "params": {"seed": draw + (side == "encoder") * ENCODER}}
            random |= {key: getattr(own, key) for key in ("protect_first", "protect_last") if own is not None}
            layers[side] = Layers.model_validate({"keep": kept} if fixed or own is None else random)
        mlp = {"keep": widths, "score": "random", "params": {"seed": draw}, "multiple_of": 1}
        wanted = {"layers": layers["main"], "encoder_layers": layers.get("encoder"), "mlp": mlp}
        try:
            drawn = plan_student(model, Student.model_validate(wanted))
        except InputError as error:
            refused = f": {error}"
            continue
        other = any(drawn.stack(side) != plan.stack(side) for side in sides)
        if other and all(_sizes(model, side, drawn) == _sizes(model, side, plan) for side in sides):
            return drawn
    raise InputError(
        f"evaluation.arms: random_cut: no student with other layers or neurons has the sizes of this one{refused}; "
        f"leave it out"
    )


def _sizes(model: Any, side: StackName, plan: StudentPlan) -> list[dict[str, torch.Size]]:
    """List the shapes of the teacher's tensors in each kept layer: some teachers have experts in some layers only."""
    layers, once = layers_of(model, side), layout_of(model).stack(side).first_only
    kept = [layers[layer.teacher_layer] for layer in plan.stack(side)]
    return [{name: own.shape for name, own in layer.named_parameters() if name not in once} for layer in kept]


def draw_weights(student: Any, seed: int) -> Any:
    """Make a model of a student's class, sizes and dtype, on the CPU, with weights drawn as the class does it."""
    config = copy.deepcopy(student.config)
    set_sizes(config, [])
    torch.manual_seed(seed)
    fresh = type(student)._from_config(config, dtype=student.dtype).eval()
    if student.can_generate():
        fresh.generation_config = copy.deepcopy(student.generation_config)
    if hasattr(student, "sentence_head"):
        fresh.sentence_head = student.sentence_head
    if not is_unequal(student.config):
        return fresh
    depths = {side: list(range(len(layers_of(student, side)))) for side in layout_of(student).sides}
    widths = [axis.units for _, _, axis in axes_of(student)]
    layers = {"layers": {"keep": depths["main"]}, "encoder_layers": {"keep": depths.get("encoder")}}
    layers = layers if "encoder" in depths else {"layers": layers["layers"]}
    mlp = {"keep": widths, "score": "random", "multiple_of": 1}
    return build_student(fresh, plan_student(fresh, Student.model_validate({**layers, "mlp": mlp})))

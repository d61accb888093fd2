"""Carry a plan out: a new, smaller model with the kept layers and neurons. The teacher is not touched."""

from __future__ import annotations

import copy
from typing import Any

import torch

from distill.errors import InputError
from distill.models.axes import keep_units
from distill.models.family import check_kept, depths_of, layers_prefix, layout_of
from distill.models.layout import Axis, StackName
from distill.models.mlp import mlps_of
from distill.models.pattern import cut_lists, settle_periods
from distill.models.plan import StudentPlan
from distill.models.widths import axes_of, empty_like, resize_layers, set_sizes


@torch.no_grad()
def build_student(teacher: Any, plan: StudentPlan) -> Any:
    """Build the student that `plan` describes, with the teacher's weights, in the teacher's dtype and on the CPU.

    Keeping every layer and neuron gives a model with the same logits to the last bit. Where the plan gives layers
    different widths, the model has them, and its config lists them as `per_layer_config`.

    Raises:
        InputError: The plan was made for another model, or its layers cannot stand without those it drops.
    """
    depths = depths_of(teacher)
    if not plan.is_for(teacher.config.model_type, depths):
        raise InputError(
            f"the plan is for a {plan.model_type} of {plan.teacher_layers} layers, "
            f"the teacher is a {teacher.config.model_type} of {depths['main']}"
        )
    for side in depths:
        check_kept(teacher, side, [layer.teacher_layer for layer in plan.stack(side)])
    student = empty_like(teacher, student_config(teacher, plan))
    resize_layers(student, lambda side, index, axis: plan.stack(side)[index].kept[axis.name].count)
    _copy_cut(teacher, student, plan)
    return student.eval()


def student_config(teacher: Any, plan: StudentPlan) -> Any:
    """Copy the teacher's config with the student's depth and largest sizes; lists with an entry per layer are cut."""
    changed = copy.deepcopy(teacher.config)
    teacher_axes = axes_of(teacher)
    sizes = [
        (axis.axis, layer.kept[axis.axis.name].count)
        for side, index, axis in teacher_axes
        for layer in plan.stack(side)
        if layer.teacher_layer == index
    ]
    set_sizes(changed, sizes)
    cut_lists(changed, plan.kept_layers)
    for side in layout_of(teacher).sides:
        setattr(changed, layout_of(teacher).stack(side).depth_key, len(plan.stack(side)))
    if hasattr(changed, "mlp_only_layers") and len(plan.layers) < plan.teacher_layers:
        # Which layers have experts follows from a rule on the layer index; the student's are listed instead.
        mlps = mlps_of(teacher)
        changed.mlp_only_layers = [index for index, layer in enumerate(plan.kept_layers) if mlps[layer].experts is None]
        changed.decoder_sparse_step = 1
    settle_periods(changed)
    return changed


def _copy_cut(teacher: Any, student: Any, plan: StudentPlan) -> None:
    """Copy the teacher's tensors into the student, each cut along every axis that it has."""
    # What is saved, and no more: other buffers (rotary frequencies) are built, and the teacher's may have been rounded.
    source, target = teacher.state_dict(), student.state_dict()
    axes: dict[tuple[StackName, int], list[Axis]] = {}
    for side, index, bound in axes_of(student):
        axes.setdefault((side, index), []).append(bound.axis)
    for side in layout_of(student).sides:
        prefix, first_only = layers_prefix(student, side) + ".", layout_of(student).stack(side).first_only
        for name in [name for name in target if name.startswith(prefix)]:
            index, inner = name.removeprefix(prefix).split(".", 1)
            layer = plan.stack(side)[int(index)]
            origin = 0 if inner in first_only else layer.teacher_layer
            tensor = source[f"{prefix}{origin}.{inner}"]
            for axis in axes[side, int(index)]:
                units = layer.kept[axis.name].units
                if units is not None and inner in axis.tensors:
                    tensor = keep_units(tensor, axis.tensors[inner], torch.tensor(units, device=tensor.device))
            target.pop(name).copy_(tensor)
    for name, tensor in target.items():
        tensor.copy_(source[name])

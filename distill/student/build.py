"""Carry a plan out: a new, smaller model with the kept layers and neurons. The teacher is not touched."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from distill.errors import InputError
from distill.models.family import check_kept, layers_of, layers_prefix, layout_of
from distill.models.layout import cut_lists
from distill.models.mlp import keep_neurons, mlps_of
from distill.models.plan import LayerPlan, StudentPlan
from distill.models.widths import all_mlps, forget_widths, narrow, widest


@torch.no_grad()
def build_student(teacher: Any, plan: StudentPlan) -> Any:
    """The student that `plan` describes, with the teacher's weights, in the teacher's dtype and on the CPU.

    Keeping every layer and neuron gives a model with the same logits to the last bit. Where the plan gives layers
    different widths, the model has them, and its config lists them as `per_layer_config`.

    Raises:
        InputError: The plan was made for another model, or its layers cannot stand without those it drops.
    """
    sides = layout_of(teacher).sides
    depths = {side: len(layers_of(teacher, side)) for side in sides}
    planned = {"main": plan.teacher_layers, "encoder": plan.teacher_encoder_layers}
    if plan.model_type != teacher.config.model_type or any(planned[side] != depths[side] for side in sides):
        raise InputError(
            f"the plan is for a {plan.model_type} of {plan.teacher_layers} layers, "
            f"the teacher is a {teacher.config.model_type} of {depths['main']}"
        )
    for side in sides:
        check_kept(teacher, side, [layer.teacher_layer for layer in plan.stack(side)])
    with no_init_weights():  # every tensor is copied below; drawing random ones first would be wasted
        student = type(teacher)._from_config(student_config(teacher, plan), dtype=teacher.dtype)
    narrow(student, {side: [layer.width for layer in plan.stack(side)] for side in sides})
    student.tie_weights()  # part of the skipped initialisation
    _copy_cut(teacher, student, plan)
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def student_config(teacher: Any, plan: StudentPlan) -> Any:
    """The teacher's config with the student's depth and widest MLPs; lists with an entry per layer are cut along."""
    changed = copy.deepcopy(teacher.config)
    forget_widths(changed)
    cut_lists(changed, plan.kept_layers)
    kept, widths = [], []
    for side in layout_of(teacher).sides:
        mlps, layers = mlps_of(teacher, side), plan.stack(side)
        setattr(changed, layout_of(teacher).stack(side).depth_key, len(layers))
        kept += [mlps[layer.teacher_layer] for layer in layers]
        widths += [layer.width for layer in layers]
    if hasattr(changed, "mlp_only_layers") and len(plan.layers) < plan.teacher_layers:
        # Which layers have experts follows from a rule on the layer index; the student's are listed instead.
        changed.mlp_only_layers = [index for index, mlp in enumerate(kept) if mlp.experts is None]
        changed.decoder_sparse_step = 1
    full = widest(every := all_mlps(teacher), [mlp.width for mlp in every])
    for key, width in widest(kept, widths).items():
        if width != full[key]:
            setattr(changed, key, width)
    return changed


def _copy_cut(teacher: Any, student: Any, plan: StudentPlan) -> None:
    # What is saved, and no more: other buffers (rotary frequencies) are built, and the teacher's may have been rounded.
    source, target = teacher.state_dict(), student.state_dict()
    layout = layout_of(student)
    for side in layout.sides:
        prefix, mlps = layers_prefix(student, side) + ".", mlps_of(student, side)
        first_only = layout.stack(side).first_only
        for name in [name for name in target if name.startswith(prefix)]:
            index, inner = name.removeprefix(prefix).split(".", 1)
            layer = plan.stack(side)[int(index)]
            origin = 0 if inner in first_only else layer.teacher_layer
            original = source[f"{prefix}{origin}.{inner}"]
            target.pop(name).copy_(_cut(original, layer, mlps[int(index)].layout.axes().get(inner)))
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _cut(tensor: Tensor, layer: LayerPlan, place: tuple[int, int] | None) -> Tensor:
    if layer.neurons is None or place is None:
        return tensor
    return keep_neurons(tensor, *place, torch.tensor(layer.neurons, device=tensor.device))

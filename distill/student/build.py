"""Carry a plan out: a new, smaller model with the kept layers and neurons. The teacher is not touched."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from distill.errors import InputError
from distill.models.layout import PER_LAYER_LISTS, layers_of, layers_prefix, layout_of
from distill.models.plan import StudentPlan


@torch.no_grad()
def build_student(teacher: Any, plan: StudentPlan) -> Any:
    """The student that `plan` describes, with the teacher's weights, in the teacher's dtype and on the CPU.

    Keeping every layer and neuron gives a model with the same logits to the last bit.

    Raises:
        InputError: The plan was made for another model, or its widths differ between layers.
    """
    depth = len(layers_of(teacher))
    if (plan.model_type, plan.teacher_layers) != (teacher.config.model_type, depth):
        raise InputError(
            f"the plan is for a {plan.model_type} of {plan.teacher_layers} layers, "
            f"the teacher is a {teacher.config.model_type} of {depth}"
        )
    with no_init_weights():  # every tensor is copied below; drawing random ones first would be wasted
        student = type(teacher)._from_config(student_config(teacher.config, plan), dtype=teacher.dtype)
    student.tie_weights()  # part of the skipped initialisation
    _reindex(layers_of(student))
    _copy_cut(teacher, student, plan)
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def student_config(config: Any, plan: StudentPlan) -> Any:
    """The teacher's config with the student's depth and width; lists with an entry per layer are cut along."""
    if len(set(plan.widths)) != 1:
        raise InputError(
            f"release.format uniform needs one MLP width for all layers, the plan has {sorted(set(plan.widths))}"
        )
    layout = layout_of(config)
    changed = copy.deepcopy(config)
    for name in PER_LAYER_LISTS:
        values = getattr(config, name, None)
        if values is not None:
            setattr(changed, name, [values[index] for index in plan.kept_layers])
    setattr(changed, layout.depth_key, len(plan.layers))
    setattr(changed, layout.width_key, plan.widths[0])
    return changed


def _reindex(layers: nn.ModuleList) -> None:
    # Caches are addressed by layer_idx; a stale one makes generation raise IndexError.
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010 (nn.Module types its attributes as modules)


def _copy_cut(teacher: Any, student: Any, plan: StudentPlan) -> None:
    prefix = layers_prefix(student) + "."
    source = {**dict(teacher.named_parameters(remove_duplicate=False)), **dict(teacher.named_buffers())}
    target = {**dict(student.named_parameters(remove_duplicate=False)), **dict(student.named_buffers())}
    rows, columns = _cut_names(student)
    for name, tensor in target.items():
        if not name.startswith(prefix):
            tensor.copy_(source[name])
            continue
        index, inner = name.removeprefix(prefix).split(".", 1)
        layer = plan.layers[int(index)]
        original = source[f"{prefix}{layer.teacher_layer}.{inner}"]
        tensor.copy_(_cut(original, layer.neurons, inner in rows, inner in columns))


def _cut_names(student: Any) -> tuple[set[str], set[str]]:
    """Names inside a layer of the tensors whose rows, and of those whose columns, belong to neurons."""
    layout = layout_of(student.config)
    rows = {f"{path}.{kind}" for path in layout.mlp_in for kind in ("weight", "bias")}
    return rows, {f"{layout.mlp_out}.weight"}


def _cut(tensor: Tensor, neurons: list[int] | None, by_row: bool, by_column: bool) -> Tensor:
    if neurons is None or not (by_row or by_column):
        return tensor
    return tensor[neurons] if by_row else tensor[:, neurons]

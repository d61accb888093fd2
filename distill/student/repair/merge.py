"""Fold a linear map into the MLP before each dropped block so that its output approximates the block's (ReplaceMe).

M [N, D] is what the student's MLP gives at the N calibration positions where the teacher's gives M*; H_l and H_m are
the outputs of that layer and of the last dropped one. The map T minimises ||M T - (M* + H_m - H_l)||², and the output
weights become Tᵀ W, so that nothing is added to the model. With all neurons kept, M = M* and this is ReplaceMe
(Shopkhoev et al. 2025, arXiv 2505.02819) with two differences: where the MLP has an output bias, an intercept is fitted
with T; and the ridge pulls T towards the identity, which is plain dropping, instead of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from distill.models.family import layers_of, layout_of
from distill.models.forward import Batch, first_tensor
from distill.models.memory import split_groups
from distill.models.mlp import NeuronAxis, mlps_of
from distill.models.plan import StudentPlan
from distill.student.repair.moments import LayerError, Moments, Pass, moment_bytes, solve_ridge


@dataclass(frozen=True)
class Block:
    """Dropped layers and the kept one before them."""

    layer: int
    """Index of the kept layer in the student."""
    before: int
    """Index of the kept layer in the teacher."""
    last: int
    """Index of the last dropped layer in the teacher."""
    teacher: NeuronAxis
    student: NeuronAxis
    kept: Tensor | None
    """Neurons that the student keeps; None: all, or experts, whose own module knows."""


def merge_blocks(
    teacher: Any, student: Any, plan: StudentPlan, batches: Sequence[Batch], ridge: float, most: int
) -> tuple[list[LayerError], list[str]]:
    """Merge every block that follows a kept layer; returns the errors, and notes on blocks that could not be merged.

    Args:
        teacher: Gives the activations; not changed.
        student: Changed in place; on the teacher's device.
        plan: The plan that the student was cut by.
        batches: The calibration sample; gone through once for each group of blocks.
        ridge: Pulls each map towards the identity, as in `solve_ridge`.
        most: Bytes of moments to hold at a time.
    """
    key = layout_of(teacher).main.scale_key
    scale = float(getattr(teacher.config, key)) if key else 1.0
    blocks = list(_blocks(teacher, student, plan))
    errors = []
    for group in split_groups(blocks, lambda block: moment_bytes(2 * teacher.config.hidden_size), most):
        for block, moments in zip(group, _block_moments(teacher, group, batches, scale), strict=True):
            before, after = _merge(block.student, moments, ridge)
            values = max(1, moments.count) * (len(moments.total) // 2)
            errors.append(LayerError(block.layer, block.before, before / values, after / values))
    first = plan.kept_layers[0]
    notes = [f"the first {first} layers of the teacher have no kept layer before them"] if first else []
    return errors, notes if blocks or notes else ["no layer was dropped"]


def _blocks(teacher: Any, student: Any, plan: StudentPlan) -> Iterator[Block]:
    teacher_mlps, student_mlps = mlps_of(teacher), mlps_of(student)
    following = [*plan.kept_layers[1:], plan.teacher_layers]
    for index, (layer, after) in enumerate(zip(plan.layers, following, strict=True)):
        before = layer.teacher_layer
        if after - before > 1:
            narrow = layer.neurons is not None and teacher_mlps[before].experts is None
            kept = torch.tensor(layer.neurons, device=teacher.device) if narrow else None
            yield Block(index, before, after - 1, teacher_mlps[before], student_mlps[index], kept)


def _block_moments(teacher: Any, group: Sequence[Block], batches: Sequence[Batch], scale: float) -> list[Moments]:
    """Collect the moments of [M, M* + (H_m - H_l) - M], both [N, D], for each block."""
    step = Pass(teacher, [2 * block.teacher.weight_out.shape[-2] for block in group])
    watched = [
        _watch(block, layers_of(teacher), scale, partial(step.add, number)) for number, block in enumerate(group)
    ]
    return step.run(batches, [handle for handles in watched for handle in handles])


def _watch(block: Block, layers: Any, scale: float, on_values: Callable[[Tensor], None]) -> list[RemovableHandle]:
    """Attach hooks that compute [M, M* + (H_m - H_l) - M] of every position, [B * L, 2 D]."""
    states: dict[str, Tensor] = {}

    def cast(value: Any) -> Any:  # the teacher may compute in another dtype than the student is stored in
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(block.student.weight_out.dtype) if floats else value

    def mlp(_module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        if block.kept is not None:
            args = (args[0].index_select(-1, block.kept), *args[1:])
        own = {name: cast(value) for name, value in kwargs.items()}
        states["given"] = block.student.output(*map(cast, args), **own).flatten(0, -2)
        states["missing"] = output.flatten(0, -2).double() - states["given"].double()

    def before(_module: Any, _args: Any, output: Any) -> None:
        states["before"] = first_tensor(output).flatten(0, -2).double()

    def last(_module: Any, _args: Any, output: Any) -> None:
        passed = (first_tensor(output).flatten(0, -2).double() - states["before"]) / scale
        on_values(torch.cat([states["given"].double(), states["missing"] + passed], dim=-1))

    return [
        block.teacher.output.register_forward_hook(mlp, with_kwargs=True),
        layers[block.before].register_forward_hook(before),
        layers[block.last].register_forward_hook(last),
    ]


def _merge(mlp: NeuronAxis, moments: Moments, ridge: float) -> tuple[float, float]:
    """Multiply the map into the output weights; returns the squared error over the positions before and after."""
    width = len(moments.total) // 2
    products = moments.about(centred=mlp.bias_out is not None)
    given, cross = products[:width, :width], products[:width, width:]
    change = solve_ridge(given, cross, ridge)  # T - I, [D, D]
    weight = mlp.weight_out.double()
    mlp.weight_out.copy_(weight + change.T @ weight)
    if mlp.bias_out is not None:
        mean_given, mean_missing = moments.mean().view(2, width)
        bias = mlp.bias_out.double()
        # The map also applies to the bias inside M; the intercept is what the means still lack then.
        mlp.bias_out.copy_(bias + change.T @ bias + mean_missing - change.T @ mean_given)
    before = float(moments.products[width:, width:].trace())
    rest = products[width:, width:].trace() - 2 * (change * cross).sum() + (change * (given @ change)).sum()
    return before, max(0.0, float(rest))

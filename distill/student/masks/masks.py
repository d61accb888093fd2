"""Masks: weights of the MLPs that are zero and stay zero while the others learn.

Masking gradients alone would not do: AdamW's momentum and decay move a weight whose gradient is zero. So the masks are
applied to the weights after every optimizer step; gradients are masked as well, so that clipping does not count what
cannot move. F neurons, E experts.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import InputError
from distill.models.axes import spread_units, sum_per_unit
from distill.models.dtensor import full_tensor, local_shard, shard_like
from distill.models.family import layers_prefix, layout_of
from distill.models.layout import UnitDim
from distill.models.mlp import placed_mlps
from distill.recipe.schema import Mask
from distill.registry import bind, find


def magnitude(weights: list[Tensor], _layer: int) -> list[Tensor]:
    """|w|."""
    return [weight.abs() for weight in weights]


def random(weights: list[Tensor], layer: int, *, seed: int = 0) -> list[Tensor]:
    """Uniform random scores: the control for every other score."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    return [torch.rand(weight.shape, generator=generator).to(weight.device) for weight in weights]


MASK_SCORES: dict[str, Callable[..., list[Tensor]]] = {"magnitude": magnitude, "random": random}
"""`(weights, layer, *, ...) -> scores`: the chosen weights of one layer, and a value of at least 0 for each of them."""


def progress(spec: Mask, step: int, steps: int) -> float | None:
    """Compute the share of the mask that is due after `step` of `steps` steps; None when nothing is chosen then.

    `cubic` is 1 - (1 - t)^3 (Zhu & Gupta 2017, arXiv 1710.01878, from sparsity 0): many weights go while there are
    many, few when there are few, none after `end`.
    """
    begin, end = round(spec.begin * steps), round(spec.end * steps)
    if spec.schedule == "one_shot":
        return 1.0 if step == begin else None
    if not begin <= step <= end or ((step - begin) % spec.every and step != end):
        return None
    return 1 - (1 - (step - begin) / (end - begin)) ** 3 if end > begin else 1.0


def lowest(scores: Tensor, count: int) -> Tensor:
    """Select exactly the `count` lowest entries, bool in the shape of `scores`, ties to the lower index."""
    flat = scores.flatten()
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    edge = flat.kthvalue(count).values
    chosen = flat < edge
    ties = (flat == edge).nonzero().squeeze(-1)
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen.view_as(scores)


def choose(scores: Sequence[Tensor], taken: Sequence[Tensor], spec: Mask, share: float) -> list[Tensor]:
    """Choose the entries to mask, bool for each of `scores`. What is `taken` stays masked and comes first.

    Args:
        scores: At least 0 each; `sparsity` counts over all of them together.
        taken: Bool of the same shapes: True where it is masked already.
        spec: `sparsity` or `threshold`.
        share: Part of that which is due, from 0 to 1.
    """
    flat = torch.cat([score.flatten().float() for score in scores])
    old = torch.cat([mask.flatten() for mask in taken])
    if spec.threshold is not None:
        bound = spec.threshold * share * flat.masked_fill(old, 0).mean(dtype=torch.float64)
        masked = old | (flat < bound)
    else:
        assert spec.sparsity is not None, "load_recipe checks that one of sparsity and threshold is given"
        # 1e-9 keeps 0.7 * 10 from falling to 6 by rounding error.
        count = int(spec.sparsity * share * len(flat) + 1e-9)
        masked = lowest(flat.masked_fill(old, -math.inf), max(count, int(old.sum())))
    pieces = torch.split(masked, [score.numel() for score in scores])
    return [piece.view_as(score) for piece, score in zip(pieces, scores, strict=True)]


@dataclass(frozen=True)
class MaskedTensor:
    """One tensor of an MLP that may be masked."""

    name: str
    """Name of the parameter in the model."""
    parameter: nn.Parameter
    dim: UnitDim
    """The dimension of its neurons."""
    per_expert: bool


def maskable(model: Any, spec: Mask) -> list[list[MaskedTensor]]:
    """Per layer, the tensors of its MLP that may be masked: chosen by name, and learning.

    Raises:
        InputError: A pattern matches no tensor of an MLP, or all that match are frozen.
    """
    prefixes = {side: layers_prefix(model, side) for side in layout_of(model).sides}
    names: list[str] = []
    chosen: list[list[MaskedTensor]] = []
    for side, index, mlp in placed_mlps(model):
        chosen.append([])
        for name, parameter in mlp.tensors.items():
            if parameter.ndim == 1 and spec.per == "weight":
                continue  # biases are few and cost nothing; a whole neuron takes its own along
            names.append(f"{prefixes[side]}.{index}.{name}")
            if parameter.requires_grad and any(fnmatch.fnmatchcase(names[-1], pattern) for pattern in spec.only):
                tensor = MaskedTensor(names[-1], parameter, mlp.axis.tensors[name], mlp.axis.per_expert)
                chosen[-1].append(tensor)
    for pattern in spec.only:
        if not fnmatch.filter(names, pattern):
            raise InputError(
                f"student.mask.only: {pattern!r} matches no weight of the student's MLPs; "
                f"there are e.g. {', '.join(names[:3])}"
            )
    if not any(tensor.parameter.ndim > 1 for tensors in chosen for tensor in tensors):
        raise InputError("student.mask: every weight that it may choose is frozen by training.freeze or training.only")
    return chosen


class Masks:
    """The masks of one model through one training: chosen when due, applied after every step, kept in checkpoints.

    Whatever is masked once stays masked. Choices depend on the weights alone, so ranks with equal weights make the
    same ones. Sharded weights are put together for a choice, one layer at a time; a mask is sharded like its parameter.
    """

    def __init__(self, model: Any, spec: Mask, steps: int):
        """Look at the model; nothing is masked yet.

        Args:
            model: The student; what does not learn has `requires_grad` off already.
            spec: The recipe's `student.mask`.
            steps: Length of the training.

        Raises:
            InputError: `only` or `score` leads nowhere.
        """
        self.spec = spec
        self.steps = steps
        self.layers = maskable(model, spec)
        self.score = bind(find(MASK_SCORES, spec.score, "mask score"), spec.params, "student.mask.params")
        self.masks: dict[str, Tensor] = {}
        """Bool, True where the parameter of that name is zero; sharded like it."""

    def follow(self, model: Any) -> None:
        """Mask the parameters of `model` instead: the first one, or a copy of it, whose parameters may be sharded."""
        named = dict(model.named_parameters(remove_duplicate=False))
        self.layers = [[replace(tensor, parameter=named[tensor.name]) for tensor in tensors] for tensors in self.layers]

    def before_step(self) -> None:
        """Take masked weights out of the gradients."""
        for tensor in self._masked():
            if tensor.parameter.grad is not None:
                local_shard(tensor.parameter.grad).masked_fill_(local_shard(self.masks[tensor.name]), 0)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Zero the masked weights, and choose those due after so many steps (0: before the first)."""
        self.apply()
        share = progress(self.spec, step, self.steps)
        if share is not None:
            for layer, tensors in enumerate(self.layers):
                self._choose(layer, tensors, share)
            self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the masked weights."""
        for tensor in self._masked():
            local_shard(tensor.parameter).masked_fill_(local_shard(self.masks[tensor.name]), 0)

    def tensors(self) -> dict[str, Tensor]:
        """The masks by name, for a checkpoint."""
        return dict(self.masks)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from the masks of a checkpoint."""
        parameters = {member.name: member.parameter for layer in self.layers for member in layer}
        self.masks = {name: shard_like(mask, parameters[name]) for name, mask in tensors.items()}

    def figures(self) -> dict[str, float]:
        """Compute `sparsity`, the masked share of all that may be masked, for the log."""
        total = sum(tensor.parameter.numel() for tensors in self.layers for tensor in tensors)
        return {"sparsity": sum(int(full_tensor(mask.sum())) for mask in self.masks.values()) / total}

    def _masked(self) -> list[MaskedTensor]:
        return [tensor for tensors in self.layers for tensor in tensors if tensor.name in self.masks]

    def _choose(self, layer: int, tensors: list[MaskedTensor], share: float) -> None:
        weights = [tensor for tensor in tensors if tensor.parameter.ndim > 1]
        if not weights:
            return
        values = [full_tensor(weight.parameter.detach()) for weight in weights]
        scores = self.score(values, layer)
        if [score.shape for score in scores] != [value.shape for value in values]:
            raise InputError(f"student.mask.score: {self.spec.score} must return one score for each weight")
        masks = [self.masks.get(weight.name) for weight in weights]
        taken = [
            torch.zeros_like(value, dtype=torch.bool) if mask is None else full_tensor(mask)
            for mask, value in zip(masks, values, strict=True)
        ]
        if self.spec.per == "weight":
            self._set(weights, choose(scores, taken, self.spec, share))
            return
        squares = [
            sum_per_unit(score.float().square(), weight.dim, weight.per_expert)
            for weight, score in zip(weights, scores, strict=True)
        ]
        norms = torch.stack(squares).sum(0).sqrt()
        dead = sum_per_unit(taken[0].long(), weights[0].dim, weights[0].per_expert) > 0
        # Each expert gives up the same number, so that `compact` can take them out.
        alone = self.spec.sparsity is not None and norms.ndim == 2
        pairs = zip(norms, dead, strict=True) if alone else [(norms, dead)]
        chosen = [choose([expert], [gone], self.spec, share)[0] for expert, gone in pairs]
        neurons = torch.stack(chosen) if alone else chosen[0]
        self._set(tensors, [spread_units(neurons, tensor.dim, tensor.parameter.shape) for tensor in tensors])

    def _set(self, tensors: Sequence[MaskedTensor], masks: Sequence[Tensor]) -> None:
        pairs = zip(tensors, masks, strict=True)
        self.masks |= {tensor.name: shard_like(mask, tensor.parameter) for tensor, mask in pairs}

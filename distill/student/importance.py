"""How much each MLP neuron matters: one function per score, `(layer, statistics, **own) -> [F]`, higher is kept.

F is the width of the layer's MLP. Neuron i is row i of each weight in `layer.weights_in` ([F, D]) and column i of
`layer.weight_out` ([D, F]).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.errors import InputError
from distill.student.calibrate import Statistics

ROWS = 256
"""Rows of a matrix that are looked at together."""


@dataclass(frozen=True)
class MlpLayer:
    """One layer's MLP as a score sees it."""

    index: int
    """Index of the layer in the teacher."""
    weights_in: list[Tensor]
    """[F, D] each: gate and up, or the single first projection."""
    weight_out: Tensor
    """[D, F]."""


def activation(layer: MlpLayer, statistics: Statistics | None) -> Tensor:
    """Mean absolute activation over real tokens: mean |x_i| of the input of the last projection.

    Source: Muralidharan et al. 2024, Minitron (arXiv 2407.14679), with the mean taken over tokens so that the score
    does not depend on batch size or padding.
    """
    if statistics is None:
        raise InputError("student.mlp.score: `activation` needs calibration data")
    return statistics.mean_abs(layer.index)


def output_norm(layer: MlpLayer, statistics: Statistics | None) -> Tensor:
    """Root mean square activation times the norm of the outgoing weights: sqrt(E x_i^2) * ||W_out[:, i]||_2.

    The size of what the neuron adds to the residual stream. Source: Wanda (Sun et al. 2023, arXiv 2306.11695) summed
    over a neuron's outgoing weights in the 2-norm.
    """
    if statistics is None:
        raise InputError("student.mlp.score: `output_norm` needs calibration data")
    outgoing = layer.weight_out.double().square().sum(dim=-2)
    return torch.sqrt(statistics.mean_square(layer.index) * outgoing)


def magnitude(layer: MlpLayer, _statistics: Statistics | None) -> Tensor:
    """2-norm of all weights of the neuron: its rows in gate and up and its column in down; needs no data."""
    squares = squared_norms(layer.weight_out, -2)
    for weight in layer.weights_in:
        squares += squared_norms(weight, -1)
    return torch.sqrt(squares)


def squared_norms(weight: Tensor, axis: int) -> Tensor:
    """Sum of squares along `axis` in fp32, taken in slices of the rows: no copy of a whole half-precision matrix."""
    slices = [part.float().square().sum(axis) for part in torch.split(weight, ROWS, dim=-2)]
    return torch.cat(slices, dim=-1) if axis == -1 else torch.stack(slices).sum(0)


def random(layer: MlpLayer, _statistics: Statistics | None, *, seed: int = 0) -> Tensor:
    """Uniform random scores: the control for every other score."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer.index)
    return torch.rand((*layer.weight_out.shape[:-2], layer.weight_out.shape[-1]), generator=generator)


SCORES: dict[str, Callable[..., Tensor]] = {
    "activation": activation,
    "output_norm": output_norm,
    "magnitude": magnitude,
    "random": random,
}

"""How many zeros a model's MLPs hold: pure functions, for reports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.models.family import layout_of
from distill.models.layout import StackName
from distill.models.mlp import mlps_of


@dataclass(frozen=True)
class MatrixSparsity:
    """The zeros of one weight of one layer's MLP. A fused weight is one matrix, and so are all experts of a layer."""

    side: StackName
    """Which stack: `main` or `encoder`."""
    layer: int
    """Index of the layer in its stack."""
    name: str
    """Name inside the layer, e.g. `mlp.down_proj.weight`."""
    weights: int
    """Number of weights."""
    zeros: int
    """How many are exactly zero."""
    neurons: int
    """Number of neurons, of all experts together."""
    zero_neurons: int
    """Neurons all of whose weights in this matrix are zero."""
    norm: float
    """2-norm of the matrix."""

    @property
    def share(self) -> float:
        """Zeros by weights."""
        return self.zeros / self.weights


def per_neuron(values: Tensor, axis: int, parts: int, experts: bool) -> Tensor:
    """Sums over what belongs to each neuron, [F] or [E, F].

    Args:
        values: Laid out like a weight or bias of an MLP.
        axis: Where the neurons lie.
        parts: How often each occurs.
        experts: Whether axis 0 counts experts, which have neurons of their own.
    """
    split = torch.unflatten(values, axis, (parts, -1))
    kept = {axis + 1, 0} if experts else {axis + 1}
    return split.sum([dim for dim in range(split.ndim) if dim not in kept])


@torch.no_grad()
def sparsity(model: Any) -> list[MatrixSparsity]:
    """One row for each weight of each layer's MLP, in the order of the forward pass."""
    rows = []
    for side in layout_of(model).sides:
        for layer, mlp in enumerate(mlps_of(model, side)):
            tensors = dict(mlp.layer.named_parameters())
            for name, (axis, parts) in mlp.layout.axes().items():
                weight = tensors.get(name)
                if weight is None or weight.ndim < 2:
                    continue
                alive = per_neuron((weight != 0).long(), axis, parts, mlp.experts is not None)
                rows.append(
                    MatrixSparsity(
                        side=side,
                        layer=layer,
                        name=name,
                        weights=weight.numel(),
                        zeros=weight.numel() - int(alive.sum()),
                        neurons=alive.numel(),
                        zero_neurons=int((alive == 0).sum()),
                        norm=float(weight.double().norm()),
                    )
                )
    return rows


def zeros(rows: Iterable[MatrixSparsity]) -> float:
    """Share of zeros over all rows, by weights."""
    rows = list(rows)
    return sum(row.zeros for row in rows) / sum(row.weights for row in rows)

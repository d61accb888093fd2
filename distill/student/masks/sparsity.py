"""Count the zeros in a model's MLPs, for reports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from distill.models.axes import sum_per_unit
from distill.models.layout import StackName
from distill.models.mlp import placed_mlps


@dataclass(frozen=True)
class MatrixSparsity:
    """The zeros of one weight of one layer's MLP. A fused weight is one matrix, and so are all experts of a layer."""

    side: StackName
    """`main` or `encoder`."""
    layer: int
    """Index of the layer in its stack."""
    name: str
    """Name inside the layer, e.g. `mlp.down_proj.weight`."""
    weights: int
    """Number of weights."""
    zeros: int
    """Number of weights that are exactly zero."""
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


@torch.no_grad()
def sparsity(model: Any) -> list[MatrixSparsity]:
    """Count zeros, one row for each weight of each layer's MLP, in the order of the forward pass."""
    rows = []
    for side, layer, mlp in placed_mlps(model):
        for name, weight in mlp.tensors.items():
            if weight.ndim < 2:
                continue
            alive = sum_per_unit((weight != 0).long(), mlp.axis.tensors[name], mlp.axis.per_expert)
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

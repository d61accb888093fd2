"""Count the zeros in a model's MLPs, for reports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.models.axes import sum_per_unit
from distill.models.mlp import placed_mlps


@torch.no_grad()
def tabulate_sparsity(model: Any) -> dict[str, Any]:
    """Tabulate the zeros in a model's MLPs.

    Returns:
        `zeros`, their share of all weights; `widths` of the MLPs; and in `matrices` a row for each weight of each
        layer's MLP, in the order of the forward pass. A fused weight is one matrix, and so are all experts of a layer;
        `neurons` counts those of all experts, `zero_neurons` those whose weights in the matrix are all zero, `norm` is
        the 2-norm.
    """
    placed, rows = placed_mlps(model), []
    for side, index, mlp in placed:
        for name, weight in mlp.tensors.items():
            if weight.ndim > 1:
                nonzero = sum_per_unit((weight != 0).long(), mlp.axis.tensors[name], mlp.axis.per_expert)
                rows.append({"side": side, "layer": index, "name": name, **_count(weight, nonzero)})
    return {
        "zeros": sum(row["zeros"] for row in rows) / sum(row["weights"] for row in rows),
        "widths": [mlp.width for side, _, mlp in placed if side == "main"],
        "matrices": rows,
    }


def _count(weight: Tensor, nonzero: Tensor) -> dict[str, Any]:
    """Count weights and neurons that are zero, given the number of nonzero weights of each neuron."""
    zeros = weight.numel() - int(nonzero.sum())
    return {
        "weights": weight.numel(),
        "zeros": zeros,
        "neurons": nonzero.numel(),
        "zero_neurons": int((nonzero == 0).sum()),
        "norm": float(weight.double().norm()),
        "share": zeros / weight.numel(),
    }

"""Sums over large weights without a wider copy of them: a half-precision teacher of 1 B parameters must fit once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WIDENED_AT_ONCE = 2**22
"""Numbers that are widened at a time."""


def column_sums(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Sum function(*tensors), computed in fp32, over D; [..., F] in float64.

    Args:
        function: Element by element.
        tensors: [..., D, F] each, of one shape and any dtype; views with other strides are fine.
    """
    first = tensors[0]
    depth = first.shape[-2]
    step = max(1, WIDENED_AT_ONCE * depth // max(1, first.numel()))
    total = torch.zeros((*first.shape[:-2], first.shape[-1]), dtype=torch.float64, device=first.device)
    for start in range(0, depth, step):
        chunks = (tensor[..., start : start + step, :].float() for tensor in tensors)
        total += function(*chunks).sum(dim=-2, dtype=torch.float64)
    return total


def column_products(weight: Tensor) -> Tensor:
    """Multiply WᵀW of a weight [D, F], the inner products of its columns; [F, F] in float64."""
    step = max(1, WIDENED_AT_ONCE // weight.shape[1])
    total = torch.zeros((weight.shape[1],) * 2, dtype=torch.float64, device=weight.device)
    for start in range(0, len(weight), step):
        wide = weight[start : start + step].double()
        total.addmm_(wide.T, wide)
    return total

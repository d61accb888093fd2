"""Second moments over the calibration positions, from which least squares is solved.

Sums run over real tokens in float64. N positions, K numbers per position.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from distill.models.forward import Batch, run_base

LARGEST = 4 * 2**30
"""Bytes of moments that are held at a time; more is collected in several passes over the sample."""


@dataclass(frozen=True)
class LayerError:
    """Mean squared error of one student layer's MLP output on the calibration sample."""

    student_layer: int
    teacher_layer: int
    mse_before: float
    """Per value of the output, before the step."""
    mse_after: float
    """After it."""


class Moments:
    """Sums over positions of a vector of K numbers and of its products with itself."""

    def __init__(self, size: int, device: torch.device):
        self.count = 0
        self.total = torch.zeros(size, dtype=torch.float64, device=device)
        """[K]"""
        self.products = torch.zeros(size, size, dtype=torch.float64, device=device)
        """[K, K]"""

    def add(self, values: Tensor) -> None:
        """Add positions [N, K]."""
        wide = values.double()
        self.count += len(wide)
        self.total += wide.sum(dim=0)
        self.products.addmm_(wide.T, wide)

    def mean(self) -> Tensor:
        """[K]; 0 where nothing was seen."""
        return self.total / max(1, self.count)

    def about(self, centred: bool) -> Tensor:
        """[K, K] sums of products; when `centred`, of deviations from the mean, for fits with an intercept."""
        return self.products - torch.outer(self.total, self.mean()) if centred else self.products


def moment_bytes(size: int) -> int:
    """Memory of the moments of `size` numbers."""
    return 8 * size * (size + 1)


class Pass:
    """One pass of a model over the sample: hooks, which its caller attaches, add to moments of the sizes K."""

    def __init__(self, model: Any, sizes: Iterable[int]):
        self.model, self.moments = model, [Moments(size, model.device) for size in sizes]
        self.real = torch.empty(0)
        """Boolean [B * L]: True at the real tokens of the current batch."""

    def add(self, number: int, values: Tensor, positions: Tensor | None = None) -> None:
        """Add to the moments of this number the real ones among values [N, K] at flat positions [N] (None: all)."""
        self.moments[number].add(values[self.real if positions is None else self.real[positions]])

    def run(self, batches: Iterable[Batch], handles: Sequence[RemovableHandle]) -> list[Moments]:
        """Run the base model over the batches, then remove the hooks; returns the moments."""

        def note_real(batch: Batch) -> None:
            self.real = batch["attention_mask"].bool().flatten()

        run_base(self.model, batches, handles, note_real)
        return self.moments


def solve_ridge(inputs: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Solve for the d [K, M] that minimises ||X d - Y||² + ridge · mean(diag(XᵀX)) · ||d||².

    Args:
        inputs: XᵀX, [K, K].
        cross: XᵀY, [K, M].
        ridge: Pulls d towards 0. With 0, a singular XᵀX gives the d of the smallest norm.
    """
    damped = inputs.clone()
    damped.diagonal().add_(ridge * inputs.diagonal().mean())
    if ridge:
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed.item():
            return torch.cholesky_solve(cross, factor)
    inverse: Tensor = torch.linalg.pinv(damped, hermitian=True)
    return inverse @ cross

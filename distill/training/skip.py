"""Skip steps whose loss or gradient is not finite, or whose gradient is far larger than the ones before.

The decision is made of tensors that are the same on every rank, and stays on the device: the host does not wait.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

WINDOW = 31
"""Gradient norms that the median is taken of; it says nothing before half of them are there."""


class SkipRule:
    """Recent gradient norms, and how many steps were skipped."""

    def __init__(self, factor: float | None, device: torch.device):
        """Start without a history.

        Args:
            factor: A norm of more than so many medians is a spike; None: no norm is.
            device: Where training runs.
        """
        self.factor = math.inf if factor is None else factor
        self.norms = torch.full((WINDOW,), math.inf, device=device)
        self.skipped = torch.zeros(2, dtype=torch.int64, device=device)
        """Steps skipped: in all, and in a row up to now."""

    def should_skip(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Return 1.0 where the step must be skipped, else 0.0; both arguments are of the whole step, shape [].

        A spike enters the history, a norm that is not finite does not: a gradient that stays large is the new normal
        after half a window, and training goes on. Nor does 0, of a step in which nothing had a label or a weight: next
        to it everything would be a spike.
        """
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        bad = ~finite | (norm > self.factor * self.norms.median())
        self.norms = torch.where(finite & (norm > 0), torch.cat([self.norms[1:], norm.reshape(1)]), self.norms)
        self.skipped = torch.stack([self.skipped[0] + bad, (self.skipped[1] + 1) * bad])
        return bad.float()

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint has to hold."""
        return {"norms": self.norms, "skipped": self.skipped}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        self.norms = tensors["norms"].to(self.norms.device)
        self.skipped = tensors["skipped"].to(self.skipped.device)

"""The one module that Accelerate prepares: the student together with the objective.

The loss is computed inside this module's forward. Outside, it would be computed on the unwrapped student, and DDP would
silently skip the all-reduce.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from distill.models.forward import Batch, Outputs, forward

if TYPE_CHECKING:
    from distill.losses import Objective


class DistillModel(nn.Module):
    """Student and objective: (batch, teacher's outputs, global counts, progress) -> (loss, per-term sums)."""

    def __init__(self, student: Any, objective: Objective):
        super().__init__()
        self.student = student
        self.projections = objective.projections
        self.objective = objective
        self._no_split_modules = getattr(student, "_no_split_modules", None)
        """Names of the classes that FSDP makes units of."""

    def forward(
        self, batch: Batch, teacher: Outputs | None, counts: Tensor, progress: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Compute this micro-batch's share of the step's mean loss [], and sums [terms] for the log."""
        own = forward(self.student, batch, self.objective.student)
        return self.objective(own, teacher, batch, counts, progress)

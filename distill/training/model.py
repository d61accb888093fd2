"""The one module that Accelerate prepares: the student together with the objective.

The loss is computed inside this module's forward. Outside, it would be computed on the unwrapped student, and DDP would
silently skip the all-reduce.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from distill.models.forward import Batch, Capture, Outputs, forward


class Loss(Protocol):
    """Objective as training uses it (`distill.losses.Objective`)."""

    student: Capture
    projections: nn.ModuleDict
    """Parameters of its own, trained and checkpointed with the student."""

    @property
    def names(self) -> list[str]:
        """One name per term."""

    def counts(self, batches: Sequence[Batch]) -> Tensor:
        """Count the positions of each term in these batches, int64 [terms]."""

    def __call__(
        self, student: Outputs, teacher: Outputs | None, batch: Batch, counts: Tensor, progress: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Compute (loss [], sums [terms]) from the counts of the whole step and the share of the training done."""


class Constraint(Protocol):
    """Condition on the weights after every optimizer step, e.g. masks (`distill.student.masks.masks.Masks`)."""

    def follow(self, model: Any) -> None:
        """Look after the weights of `model` from here on, under the same names; they may be sharded (DTensor)."""

    def before_step(self) -> None:
        """Change the gradients, which are complete and not clipped yet."""

    def after_step(self, step: int) -> None:
        """Restore the condition after so many optimizer steps; called with 0 before the first."""

    def apply(self) -> None:
        """Restore the condition on weights that were replaced; choose nothing new."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint has to hold."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave; called instead of `after_step(0)`."""

    def figures(self) -> dict[str, float]:
        """Return figures for the log."""


class DistillModel(nn.Module):
    """Student and objective: (batch, teacher's outputs, global counts, progress) -> (loss, per-term sums)."""

    def __init__(self, student: Any, objective: Loss):
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

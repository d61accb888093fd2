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
    """What training needs of an objective (`distill.losses.Objective`)."""

    student: Capture
    projections: nn.ModuleDict
    """Parameters of its own, trained and checkpointed with the student."""

    @property
    def names(self) -> list[str]:
        """One name per term."""

    def counts(self, batches: Sequence[Batch]) -> Tensor:
        """Int64 [terms]: how many positions each term has in these batches."""

    def __call__(
        self, student: Outputs, teacher: Outputs | None, batch: Batch, counts: Tensor, progress: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """(loss [], sums [terms]) given the counts of the whole optimizer step and the share of the training done."""


class Constraint(Protocol):
    """What must hold of the weights after every optimizer step, e.g. masks (`distill.student.masks.masks.Masks`)."""

    def follow(self, model: Any) -> None:
        """The weights to look after are now those of `model`, under the same names; they may be sharded (DTensor)."""

    def before_step(self) -> None:
        """The gradients are complete and not clipped yet."""

    def after_step(self, step: int) -> None:
        """So many optimizer steps are done; called with 0 before the first."""

    def apply(self) -> None:
        """The weights were replaced; nothing new is chosen."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold of it."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `tensors` gave; called instead of `after_step(0)`."""

    def figures(self) -> dict[str, float]:
        """For the log."""


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
        """Loss [] of this micro-batch, as its share of the whole step's mean, and sums [terms] for the log."""
        own = forward(self.student, batch, self.objective.student)
        return self.objective(own, teacher, batch, counts, progress)

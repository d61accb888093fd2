"""The loss of the labels alone, as the calibration of a teacher asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from distill.losses.objective import Objective
from distill.models.forward import Batch, Outputs
from distill.recipe.schema import Term


def label_loss(head: Literal["sequence", "next_token"]) -> Callable[[Tensor, Batch], tuple[Tensor, int]]:
    """(logits, batch) -> cross-entropy summed over valid positions, as the objective counts them, and their number."""
    objective = Objective((Term(match="labels"),), head)

    def loss(logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
        counts = objective.counts([batch])
        return objective(Outputs(logits), None, batch, torch.ones_like(counts))[0], int(counts.sum())

    return loss

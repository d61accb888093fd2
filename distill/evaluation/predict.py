"""One pass over a split: what a model predicts, how sure it is of the truth, and how far it is from the teacher.

B examples, L positions, N valid positions, V classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from distill.losses import LOGITS
from distill.models.outputs import Batch, Outputs

UNLABELLED = -100
Columns = dict[str, np.ndarray]


@torch.no_grad()
def predict(
    model: Any,
    batches: Iterable[Batch],
    head: Literal["sequence", "next_token"],
    teacher: Callable[[Batch], Outputs] | None = None,
) -> Columns:
    """Columns that the metrics read, one entry per labelled position.

    Args:
        model: A transformers model; must be in eval mode.
        batches: Batches with labels.
        head: Whether logits are [B, V] or [B, L, V] with position t predicting token t + 1.
        teacher: Where the divergence from the teacher is wanted.

    Returns:
        `predictions`, `references`, `nll`, `tokens` (ones), `correct`; with a teacher also `teacher_predictions`,
        `kl_sum` (KL(teacher || model) in nats) and `positions` (ones).
    """
    device = next(model.parameters()).device
    pieces: list[dict[str, Tensor]] = []
    for cpu_batch in batches:
        batch = {name: tensor.to(device) for name, tensor in cpu_batch.items()}
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        mask, labels = _labelled(batch["labels"], head)
        rows_NV = _predicting(logits, head)[mask].float()
        predicted = rows_NV.argmax(dim=-1)
        piece = {
            "predictions": predicted,
            "references": labels,
            "nll": functional.cross_entropy(rows_NV, labels, reduction="none"),
            "tokens": torch.ones_like(labels),
            "correct": (predicted == labels).long(),
        }
        if teacher is not None:
            teacher_NV = _predicting(teacher(batch).logits, head)[mask].float()
            piece["teacher_predictions"] = teacher_NV.argmax(dim=-1)
            piece["kl_sum"] = LOGITS["forward_kl"](rows_NV, teacher_NV)
            piece["positions"] = torch.ones_like(labels)
        pieces.append({name: values.cpu() for name, values in piece.items()})
    return {name: torch.cat([piece[name] for piece in pieces]).numpy() for name in pieces[0]} if pieces else {}


def _labelled(labels: Tensor, head: str) -> tuple[Tensor, Tensor]:
    shifted = labels[:, 1:] if head == "next_token" else labels
    mask = shifted != UNLABELLED
    return mask, shifted[mask]


def _predicting(logits: Tensor, head: str) -> Tensor:
    return logits[:, :-1] if head == "next_token" else logits


def gathered(columns: Columns, gather: Callable[[list[Columns]], list[Columns]]) -> Columns:
    """The columns of all processes, one after another; a process without examples adds nothing."""
    parts = [part for part in gather([columns]) if part]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}

"""One pass over a split: what a model predicts, how sure it is of the truth, and how far it is from the teacher.

B examples, L positions, N valid positions, V classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from distill.losses import LOGITS, PREDICTION_KINDS
from distill.losses.chunked import chunks
from distill.models.forward import UNLABELLED, Batch, Capture, Outputs, forward

Columns = dict[str, np.ndarray]


@torch.no_grad()
def predict(
    model: Any,
    batches: Iterable[Batch],
    head: str,
    teacher: Callable[[Batch], Outputs] | None = None,
    vocabulary: int | None = None,
) -> Columns:
    """Columns that the metrics read, one entry per labelled position.

    Args:
        model: A transformers model; must be in eval mode.
        batches: Batches with labels.
        head: The kind of head, a name from `distill.losses.PREDICTION_KINDS`.
        teacher: Where the divergence from the teacher is wanted.
        vocabulary: Number of real classes; what a padded output head has beyond is neither predicted nor compared, as
            in the objective. As there, the likelihood of a label is that among all rows, which is the model's own loss
            for whoever loads it.

    Returns:
        `predictions`, `references`, `nll`, `tokens` (ones), `correct`; with a teacher also `teacher_predictions`,
        `kl_sum` (KL(teacher || model) in nats) and `positions` (ones).
    """
    kind, device = PREDICTION_KINDS[head], next(model.parameters()).device
    pieces: list[dict[str, Tensor]] = []
    for cpu_batch in batches:
        batch = {name: tensor.to(device) for name, tensor in cpu_batch.items()}
        labels = kind.labels(batch)
        labelled = (labels != UNLABELLED).nonzero(as_tuple=True)
        outputs = [forward(model, batch, Capture(stop_at_head=True)), *([teacher(batch)] if teacher else [])]
        sides = [kind.select(side, batch, labelled) for side in outputs]
        for part, logits in chunks(sides):
            piece = _columns(labels[labelled][part], slice(vocabulary), *logits)
            pieces.append({name: values.cpu() for name, values in piece.items()})
    return {name: torch.cat([piece[name] for piece in pieces]).numpy() for name in pieces[0]} if pieces else {}


def _columns(labels: Tensor, classes: slice, logits: Tensor, teacher_logits: Tensor | None = None) -> dict[str, Tensor]:
    predicted = logits[..., classes].argmax(dim=-1)
    columns = {
        "predictions": predicted,
        "references": labels,
        "nll": functional.cross_entropy(logits.float(), labels, reduction="none"),
        "tokens": torch.ones_like(labels),
        "correct": (predicted == labels).long(),
    }
    if teacher_logits is not None:
        teacher_logits = teacher_logits[..., classes]
        columns["teacher_predictions"] = teacher_logits.argmax(dim=-1)
        columns["kl_sum"] = LOGITS["forward_kl"](logits[..., classes], teacher_logits)
        columns["positions"] = torch.ones_like(labels)
    return columns


def gathered(columns: Columns, gather: Callable[[list[Columns]], list[Columns]]) -> Columns:
    """The columns of all processes, one after another; a process without examples adds nothing."""
    parts = [part for part in gather([columns]) if part]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}

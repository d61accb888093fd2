"""Run models over a split and sum what the metrics need: one row per example.

B examples, L positions, N labelled positions, V classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from distill.evaluation.vectors import score_vectors
from distill.losses import LOGITS, PREDICTION_KINDS
from distill.losses.align import Positions
from distill.losses.chunked import chunks
from distill.models.forward import UNLABELLED, Batch, Capture, Outputs, forward, to_device
from distill.models.precision import autocast_for

Rows = dict[str, np.ndarray]
"""Column -> one value per example [n]; `distill.evaluation.metrics` says what the columns are."""

Ask = Callable[[Batch], Outputs]

Observe = Callable[[Any, Outputs, Batch], dict[str, Any]]
"""(model, its outputs, the batch) -> more columns, one entry per example of the batch."""

SUMS = ("example", "nll", "tokens", "correct", "agreed", "kl_sum", "positions")
COLUMNS: dict[str, tuple[str, ...]] = {
    "sequence": (*SUMS, "predictions", "references", "teacher_predictions", "confidence"),
    "multi_label": (*SUMS, "predictions", "references"),
    "regression": ("example", "tokens", "values", "targets", "teacher_values"),
    "embedding": (
        "example", "embeddings", "pair_embeddings", "values", "targets", "teacher_embeddings", "teacher_cosine",
    ),
}  # fmt: skip
"""Kind of predictions -> columns (those about pairs and scores may be missing); `SUMS` where nothing else is said."""


def column_names(head: str) -> tuple[str, ...]:
    """List the columns that an evaluation against the teacher gives."""
    return COLUMNS.get(head, SUMS)


@torch.no_grad()
def predict(
    model: Any,
    batches: Iterable[Batch],
    head: str,
    teacher: Ask | None = None,
    vocabulary: int | None = None,
    observe: Observe | None = None,
    ask: Ask | None = None,
    precision: str = "fp32",
) -> Rows:
    """Compare a model's predictions with the labels, and with the teacher's where there is one.

    Args:
        model: A transformers model; must be in eval mode.
        batches: Batches with labels, and with `examples` [B], their numbers within the split.
        head: The kind of predictions, a name from `distill.losses.PREDICTION_KINDS`.
        teacher: Where the divergence from the teacher is wanted.
        vocabulary: Number of real classes; what a padded output head has beyond is neither predicted nor compared, as
            in the objective. As there, the likelihood of a label is that among all rows, which is the model's own loss
            for whoever loads it.
        observe: Reads what the task wants beside these columns from the model and its outputs.
        ask: Answers the batches in the model's place, as a recording of its outputs does.
        precision: Of the recipe, which fp32 weights are multiplied in.

    Returns:
        A row for each example with a label, by `example`; without teacher there are no columns about it.
    """
    ask = ask or partial(forward, model, wanted=Capture(stop_at_head=True))
    device, parts = next(model.parameters()).device, []
    with autocast_for(model, precision):
        for cpu_batch in batches:
            batch = to_device(cpu_batch, device)
            outputs = ask(batch)
            sides = [outputs, teacher(batch)] if teacher else [outputs]
            vectors = PREDICTION_KINDS[head].vectors
            own, kept = _vectors(batch, sides) if vectors else _sums(head, batch, sides, vocabulary)
            if kept.any():
                seen = observe(model, outputs, batch) if observe else {}
                parts.append(own | {name: np.asarray(values)[kept] for name, values in seen.items()})
    return merge_rows(parts)


def _sums(head: str, batch: Batch, sides: Sequence[Outputs], vocabulary: int | None) -> tuple[Rows, np.ndarray]:
    """Sum the columns of each example with a label; returns them, and which of the batch's examples those are [B]."""
    score = _score_values if head == "regression" else partial(_score, confidence="confidence" in column_names(head))
    labels = PREDICTION_KINDS[head].labels(batch)
    labelled = Positions.of(labels != UNLABELLED)
    owner = labelled.index // labels[0].numel()  # row of the batch that each labelled position belongs to
    columns: dict[str, Tensor] = {}
    for part, logits in chunks([PREDICTION_KINDS[head].select(each, batch, labelled) for each in sides]):
        for name, values in score(labelled.select(labels)[part], slice(vocabulary), *logits).items():
            exact = torch.float64 if values.is_floating_point() else torch.int64
            total = columns.setdefault(name, torch.zeros(len(labels), dtype=exact, device=labels.device))
            total.index_add_(0, owner[part], values.to(exact))
    if not columns:
        return {}, np.zeros(len(labels), dtype=bool)
    columns["example"] = batch["examples"]
    if head == "multi_label" and sides[0].logits is not None:  # sets, not sums
        columns |= {"predictions": (sides[0].logits > 0).long(), "references": labels}
    kept = columns["tokens"] > 0
    rows = {name: columns[name][kept].cpu().numpy() for name in column_names(head) if name in columns}
    return rows, kept.cpu().numpy()


def _vectors(batch: Batch, sides: Sequence[Outputs]) -> tuple[Rows, np.ndarray]:
    """Compute the columns of texts with a vector each; every example counts."""
    own, *taught = (side.logits for side in sides)
    assert own is not None, "a vector is no vocabulary"
    columns = {"example": batch["examples"], **score_vectors(batch, own, taught[0] if taught else None)}
    rows = {name: values.cpu().numpy() for name, values in columns.items()}
    return rows, np.ones(len(rows["example"]), dtype=bool)


def _score(
    labels: Tensor, classes: slice, logits: Tensor, teacher_logits: Tensor | None = None, *, confidence: bool
) -> dict[str, Tensor]:
    """Compute the columns of single positions [N]; those about classes are sums of one value where there is one."""
    predicted = logits[..., classes].argmax(dim=-1)
    columns = {
        "predictions": predicted,
        "references": labels,
        "nll": functional.cross_entropy(logits.float(), labels, reduction="none"),
        "tokens": torch.ones_like(labels),
        "correct": predicted == labels,
    }
    if confidence:  # a pass more over the logits, which a vocabulary would feel
        columns["confidence"] = logits[..., classes].float().softmax(dim=-1).amax(dim=-1)
    if teacher_logits is not None:
        teacher_logits = teacher_logits[..., classes]
        taught = teacher_logits.argmax(dim=-1)
        columns["teacher_predictions"] = taught
        columns["agreed"] = predicted == taught
        columns["kl_sum"] = LOGITS["forward_kl"](logits[..., classes], teacher_logits)
        columns["positions"] = torch.ones_like(labels)
    return columns


def _score_values(
    labels: Tensor, _classes: slice, values: Tensor, teacher_values: Tensor | None = None
) -> dict[str, Tensor]:
    """Compute the columns of a regression, whose examples have one position each."""
    columns = {"tokens": torch.ones_like(labels, dtype=torch.int64), "values": values.squeeze(-1), "targets": labels}
    return columns if teacher_values is None else {**columns, "teacher_values": teacher_values.squeeze(-1)}


def merge_rows(parts: Iterable[Rows]) -> Rows:
    """Join the rows of batches or ranks in the order of the split; empty parts add nothing."""
    filled = [part for part in parts if part]
    if not filled:
        return {}
    order = np.argsort(np.concatenate([part["example"] for part in filled]), kind="stable")
    return {name: np.concatenate([part[name] for part in filled])[order] for name in filled[0]}

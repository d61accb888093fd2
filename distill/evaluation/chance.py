"""The figures of a model that has learnt nothing, which a teacher must beat."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from distill.losses import PREDICTION_KINDS
from distill.models.forward import UNLABELLED, Batch


def label_counts(batches: Iterable[Batch], head: str) -> Tensor:
    """Count how often each class, token or position is the label, int64 [V]."""
    kind, total = PREDICTION_KINDS[head], torch.zeros(0, dtype=torch.int64)
    for batch in batches:
        labels = kind.labels(batch)
        found = torch.bincount(labels[labels != UNLABELLED].flatten().long(), minlength=len(total))
        found[: len(total)] += total
        total = found
    return total


def weakness(metrics: Mapping[str, float], counts: Tensor, classes: int) -> str:
    """Say in which way a model is no better than one that has learnt nothing; empty where it is.

    Args:
        metrics: Its `loss` in nats per label, and the share `accuracy` of labels that it predicts right.
        counts: Labels by class, from `label_counts`.
        classes: Number of classes or real tokens that it chooses from.
    """
    shares = counts[counts > 0].double() / counts.sum()
    uniform, prior, majority = math.log(classes), float(-(shares * shares.log()).sum()), float(shares.max())
    loss, accuracy = metrics["loss"], metrics["accuracy"]
    if not loss < uniform and not accuracy > majority:
        return f"its loss of {loss:.4g} nats is no less than that of guessing among all {classes:,}, {uniform:.4g}"
    if not loss < prior and not accuracy > majority:
        return (
            f"it is right for {accuracy:.1%} of the labels, and the most frequent one is for {majority:.1%}; its loss "
            f"of {loss:.4g} nats is no less than that of knowing how frequent each is, {prior:.4g}"
        )
    return ""

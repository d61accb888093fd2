"""Baselines without a model: the most frequent answer, and the figures that a teacher must beat."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from distill.evaluation.formulas import pearson
from distill.losses import PREDICTION_KINDS
from distill.models.forward import UNLABELLED, Batch, Outputs
from distill.models.head import OutputHead

DEFINED = ("sequence", "multi_label", "regression", "token", "next_token", "masked_token")
"""Kinds of predictions that have a most frequent answer."""


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
    uniform, prior, majority = math.log(classes), float((shares * -shares.log()).sum()), float(shares.max())
    loss, accuracy = metrics["loss"], metrics["accuracy"]
    if not loss < uniform and not accuracy > majority:
        return f"its loss of {loss:.4g} nats is no less than that of guessing among all {classes:,}, {uniform:.4g}"
    if not loss < prior and not accuracy > majority:
        return (
            f"it is right for {accuracy:.1%} of the labels, and the most frequent one is for {majority:.1%}; its loss "
            f"of {loss:.4g} nats is no less than that of knowing how frequent each is, {prior:.4g}"
        )
    return ""


def weakness_of_numbers(values: np.ndarray, targets: np.ndarray) -> str:
    """Say that numbers [n] neither come near the labels [n] nor rise with them; empty where they do.

    Those of a teacher with another scale rise with them: their correlation is twice what chance gives, 1 / sqrt(n).
    """
    wrong, spread = float(np.square(values - targets).mean()), float(np.var(targets))
    if wrong < spread or pearson(values, targets) * math.sqrt(len(targets)) > 2:
        return ""
    return f"its mean squared error of {wrong:.4g} is no less than that of saying their mean each time, {spread:.4g}"


def most_frequent(batches: Iterable[Batch], head: str, classes: int) -> Callable[[Batch], Outputs]:
    """Build a constant predictor from the label frequencies of other examples.

    It says how frequent each class, tag or token is, with one added to each count, so that none is impossible; of sets
    of classes how frequent each one is; of numbers the mean. So its loss is that of knowing these frequencies, and what
    it predicts is the most frequent one, of a set the classes that more than half of the examples have.

    Args:
        batches: With labels to count.
        head: One of `DEFINED`.
        classes: Number of classes or real tokens.
    """
    kind = PREDICTION_KINDS[head]
    if head == "regression":
        numbers = torch.cat([labels[labels != UNLABELLED] for labels in map(kind.labels, batches)])
        constant = numbers.double().mean().float()[None]
    elif head == "multi_label":
        sets = torch.cat([labels[(labels != UNLABELLED).all(-1)] for labels in map(kind.labels, batches)])
        have, lack = sets.sum(0) + 1.0, (1 - sets).sum(0) + 1.0
        constant = (have / lack).log()
    else:
        counts = label_counts(batches, head)
        counts = torch.cat([counts, counts.new_zeros(max(0, classes - len(counts)))]) + 1
        constant = (counts.double() / counts.sum()).log().float()

    def answer(batch: Batch) -> Outputs:
        labels = batch["labels"]
        own = constant.to(labels.device)
        if kind.vocabulary:  # all logits of a vocabulary at once would take gigabytes
            last = torch.zeros(*labels.shape, 1, device=labels.device)
            return Outputs(None, last=last, head=OutputHead(own.new_zeros(len(own), 1), own))
        places = labels.shape[:2] if head == "token" else labels.shape[:1]
        return Outputs(own.expand(*places, len(own)))

    return answer

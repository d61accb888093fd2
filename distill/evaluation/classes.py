"""Per-class figures and the confusion of every arm: of classes, sets of classes, relations, and entities by type."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.evaluation.formulas import Column
from distill.evaluation.intervals import Units, percentile_interval, wilson_interval

NONE = "(none)"
"""Stands in a confusion for what is true and not found, or found and not true."""


@dataclass(frozen=True)
class Decisions:
    """True and predicted classes, one entry per decision; an example may have any number of them."""

    classes: Sequence[str]
    owner: Column
    """Row of each decision."""
    true: Column
    """Number of the class; that after the last one where the side is missing."""
    predicted: Column

    def counts(self, times: Column | None = None) -> tuple[Column, Column, Column]:
        """Count by class [C] how often it is right, true and predicted, each row as often as it was drawn."""
        weights, classes = np.ones(len(self.owner)) if times is None else times[self.owner], len(self.classes)
        sides = ((self.true, weights * (self.true == self.predicted)), (self.true, weights), (self.predicted, weights))
        right, true, predicted = (np.bincount(side, own, classes + 1)[:classes] for side, own in sides)
        return right, true, predicted

    def f1(self, times: Column | None = None) -> Column:
        """Compute F1 = 2 right / (true + predicted) by class [C]; nan for one that is neither."""
        right, true, predicted = self.counts(times)
        with np.errstate(invalid="ignore"):
            scores: Column = 2 * right / (true + predicted)
        return scores


def decisions_of(columns: Mapping[str, Column], classes: Sequence[str]) -> Decisions | None:
    """Find the decisions among the columns of an arm; None where it decides nothing of that kind."""
    if "entity_pairs" in columns:
        return _from_pairs([[tuple(pair) for pair in json.loads(text)] for text in columns["entity_pairs"]])
    if "predictions" not in columns or not classes:
        return None
    predicted, true = columns["predictions"], columns["references"]
    if predicted.ndim == 1:
        return Decisions(classes, np.arange(len(true)), true, predicted)
    owner, which = np.nonzero(predicted | true)
    none = len(classes)
    sides = [np.where(side[owner, which] > 0, which, none) for side in (true, predicted)]
    return Decisions(classes, owner, *sides)


def _from_pairs(rows: Sequence[Sequence[tuple[str | None, str | None]]]) -> Decisions:
    """Number pairs of entity types, each of which is None where the other side has no span of those ends."""
    names = sorted({name for pairs in rows for pair in pairs for name in pair if name is not None})
    number = {name: place for place, name in enumerate(names)} | {None: len(names)}
    owner = np.repeat(np.arange(len(rows)), [len(pairs) for pairs in rows])
    flat = np.array([[number[name] for name in pair] for pairs in rows for pair in pairs], dtype=int).reshape(-1, 2)
    return Decisions(names, owner, flat[:, 0], flat[:, 1])


def tabulate_classes(
    rows: Mapping[str, Mapping[str, Column]], classes: Sequence[str], units: Units
) -> dict[str, Any] | None:
    """Compute the figures of each class in each arm, with intervals for F1, and the confusions.

    Returns:
        JSON-able `classes` (arm -> class -> figures) and `confusion` (arm -> [true, predicted, times], the most
        frequent first); None where nothing is decided.
    """
    decided = {arm: found for arm, own in rows.items() if (found := decisions_of(own, classes)) is not None}
    if not decided:
        return None
    size = len(next(iter(next(iter(rows.values())).values())))
    drawn: dict[str, list[Column]] = {arm: [] for arm in decided}
    for index in units.draws():
        times = np.bincount(index, minlength=size)
        for arm, own in decided.items():
            drawn[arm].append(own.f1(times))
    return {
        "classes": {arm: _figures(own, np.array(drawn[arm])) for arm, own in decided.items()},
        "confusion": {arm: _pairs(own) for arm, own in decided.items()},
    }


def _figures(decisions: Decisions, drawn: np.ndarray) -> dict[str, Any]:
    """Write the figures of each class that is true or predicted, F1 with its interval from the draws [draws, C]."""
    found = {}
    by_class, scores = drawn.reshape(-1, len(decisions.classes)).T, decisions.f1().tolist()
    columns = zip(decisions.classes, by_class, scores, *decisions.counts(), strict=True)
    for name, own, value, right, true, predicted in columns:
        if not true + predicted:
            continue
        known = own[~np.isnan(own)]
        low, high = percentile_interval(value, known) if len(known) > len(own) / 2 else (value, value)
        if low == high:  # too few to draw from, or all alike
            low, high = wilson_interval(value, int(max(true, predicted)))
        found[name] = {
            "true": int(true),
            "predicted": int(predicted),
            "precision": float(right / predicted) if predicted else None,
            "recall": float(right / true) if true else None,
            "f1": value,
            "low": low,
            "high": high,
        }
    return found


def _pairs(decisions: Decisions) -> list[list[Any]]:
    """List the pairs [true, predicted, times] that there are, the most frequent first."""
    pairs, times = np.unique(np.stack([decisions.true, decisions.predicted]), axis=1, return_counts=True)
    order = np.argsort(-times, kind="stable")
    names = (*decisions.classes, NONE)
    return [[names[pairs[0, at]], names[pairs[1, at]], int(times[at])] for at in order]

"""An interval for every figure and every difference: the rows are drawn again, and the figure is computed anew.

All arms are computed on the same draws, so that what is hard for all of them leaves their differences (a paired
bootstrap). An interval is the bias-corrected percentile interval (Efron 1981), widened to the figure itself where that
lies outside. Where the draws cannot tell, shares of 1 get Wilson's interval, differences of shares Newcombe's (1998),
and other figures none, with the reason.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np

from distill.evaluation.formulas import OfShares
from distill.evaluation.metrics import Column, columns_of, find_metric, is_share
from distill.recipe.names import TEACHER_METRICS

LEVEL, SEED = 0.95, 0
RESAMPLES, LEAST = 1000, 100
"""Draws of all rows; fewer than the second number make no interval."""
FEW = 8
"""Fewer rows, or documents, than this make no interval by drawing them again."""
SECONDS = 20.0
"""For the draws of one metric over all arms of a set; a slow one gets fewer of them."""
NORMAL = NormalDist()
Z = NORMAL.inv_cdf((1 + LEVEL) / 2)
Rows = Mapping[str, Column]
Interval = dict[str, Any]
"""`low` and `high`, None where there are none; `by` how they were found, and a `note` where there is more to say."""


class Units:
    """What is drawn: rows, or the documents that several rows belong to, with all of these."""

    def __init__(self, ids: Column):
        self.order = np.argsort(ids, kind="stable")
        _, self.starts, self.sizes = np.unique(ids[self.order], return_index=True, return_counts=True)

    def __len__(self) -> int:
        return len(self.sizes)

    def draw(self, number: int) -> Column:
        """Draw as many units as there are, with replacement; returns the indices of their rows."""
        chosen = np.random.default_rng([SEED, number]).integers(len(self), size=len(self))
        sizes = self.sizes[chosen]
        before = np.cumsum(sizes) - sizes
        drawn: Column = self.order[np.repeat(self.starts[chosen] - before, sizes) + np.arange(sizes.sum())]
        return drawn

    def draws(self) -> Iterator[Column]:
        """Yield every draw, the same ones each time; none of too few units."""
        yield from (self.draw(number) for number in range(RESAMPLES if len(self) >= FEW else 0))


def units_of(columns: Rows, unit: str) -> tuple[Units, str]:
    """Choose what is drawn, and name it: the documents where there is a column of them, and enough; else the rows."""
    rows = np.arange(len(next(iter(columns.values()))))
    if "document" in columns and len(documents := Units(columns["document"])) >= FEW:
        return documents, "documents"
    return Units(rows), unit


@dataclass(frozen=True)
class Draws:
    """The values of one metric: of each arm, and on each draw."""

    name: str
    values: Mapping[str, float | None]
    """Arm -> value on all rows; None where it is not finite."""
    drawn: Mapping[str, Column]
    """Arm -> value on each draw."""
    units: int
    note: str = ""
    """Reason that there are fewer draws than asked for."""

    def of(self, arm: str) -> Interval:
        """Bound the figure of an arm."""
        value = self.values[arm]
        if arm == "teacher" and self.name in TEACHER_METRICS:
            return _none("the teacher against itself")
        wilson = None if value is None or not is_share(self.name) else partial_wilson(value, self.units)
        return self._bound(value, self.drawn[arm], wilson)

    def between(self, arm: str, other: str) -> Interval:
        """Subtract the figure of another arm, and bound the difference."""
        ours, theirs = self.values[arm], self.values[other]
        if ours is None or theirs is None:
            return {"value": None, **_none("one of the two is not finite")}
        newcombe = (lambda: newcombe_interval(ours, theirs, self.units)) if is_share(self.name) else None
        return {"value": ours - theirs, **self._bound(ours - theirs, self.drawn[arm] - self.drawn[other], newcombe)}

    def _bound(
        self, value: float | None, drawn: Column, closed: Callable[[], tuple[float, float, str]] | None
    ) -> Interval:
        if value is None:
            return _none("not finite")
        finite = drawn[np.isfinite(drawn)]
        reason = self.note if len(drawn) < LEAST else ""
        if self.units < FEW:
            reason = f"n too small: {self.units}"
        elif len(finite) < LEVEL * len(drawn):
            reason = f"not finite on {len(drawn) - len(finite)} of {len(drawn)} draws"
        if not reason:
            low, high = percentile_interval(value, finite)
            if low < high:
                note = {"note": self.note} if self.note else {}
                return {"low": low, "high": high, "by": f"bootstrap of {len(drawn)}", **note}
            reason = "the same on every draw"
        if closed is None:
            return _none(reason)
        low, high, by = closed()
        return {"low": low, "high": high, "by": by, "note": reason}


def _none(note: str) -> Interval:
    return {"low": None, "high": None, "by": "", "note": note}


def percentile_interval(value: float, drawn: Column) -> tuple[float, float]:
    """Bound a value by the bias-corrected percentiles of its draws."""
    below = float((drawn < value).mean() + (drawn == value).mean() / 2)
    edge = 1 / (len(drawn) + 1)
    bias = NORMAL.inv_cdf(min(max(below, edge), 1 - edge))
    low, high = np.quantile(drawn, [NORMAL.cdf(2 * bias + sign * Z) for sign in (-1, 1)]).tolist()
    return min(low, value), max(high, value)


def partial_wilson(value: float, n: int) -> Callable[[], tuple[float, float, str]]:
    """Put Wilson's interval off until it is needed."""
    return lambda: (*wilson_interval(value, n), "Wilson")


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Bound a share of n by Wilson's score interval (1927), which has a width at 0 and at 1 as well."""
    share = min(max(share, 0.0), 1.0)
    middle, scale = share + Z**2 / (2 * n), 1 + Z**2 / n
    spread = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def newcombe_interval(ours: float, theirs: float, n: int) -> tuple[float, float, str]:
    """Bound the difference of two shares of n by those of each (Newcombe 1998, method 10), as if they were apart."""
    (low, high), (their_low, their_high) = wilson_interval(ours, n), wilson_interval(theirs, n)
    down, up = math.hypot(ours - low, their_high - theirs), math.hypot(high - ours, theirs - their_low)
    return ours - theirs - down, ours - theirs + up, "Newcombe"


class _Sampled:
    """A metric of one arm that can be computed on drawn rows."""

    def __init__(self, name: str, columns: Rows):
        self.function = find_metric(name, columns)
        self.columns = [columns[column] for column in columns_of(self.function)]

    @cached_property
    def parts(self) -> list[Column]:
        return [self.function.shares(*self.columns)] if isinstance(self.function, OfShares) else self.columns

    def __call__(self, index: Column) -> float:
        total = self.function.total if isinstance(self.function, OfShares) else self.function
        return float(total(*(part[index] for part in self.parts)))


def draw_metrics(
    rows: Mapping[str, Rows], values: Mapping[str, Mapping[str, float | None]], names: Sequence[str], units: Units
) -> dict[str, Draws]:
    """Compute every metric of every arm on the same draws of rows.

    Args:
        rows: Arm -> columns; the rows are the same in all arms.
        values: Arm -> metric -> value on all rows.
        names: Metrics.
        units: What is drawn.
    """
    sampled = {name: [_Sampled(name, own) for own in rows.values()] for name in names}
    drawn: dict[str, list[list[float]]] = {name: [] for name in names}
    spent, notes = dict.fromkeys(names, 0.0), dict.fromkeys(names, "")
    with warnings.catch_warnings():  # what is undefined on a draw is counted
        warnings.simplefilter("ignore")
        for index in units.draws():
            for name in (name for name in names if not notes[name]):
                start = time.perf_counter()
                try:
                    drawn[name].append([metric(index) for metric in sampled[name]])
                except Exception as error:  # in a function of the user's own; the figure itself is there
                    drawn[name], notes[name] = [], f"it fails on drawn rows: {type(error).__name__}: {error}"
                spent[name] += time.perf_counter() - start
                if spent[name] > SECONDS and not notes[name]:
                    notes[name] = f"slow to compute: {len(drawn[name])} draws in {SECONDS:g} s"
    found = {}
    for name, own in drawn.items():
        columns = np.array(own, dtype=float).reshape(len(own), len(rows)).T
        known = {arm: values[arm][name] for arm in rows}
        found[name] = Draws(name, known, dict(zip(rows, columns, strict=True)), len(units), notes[name])
    return found

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
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np

from distill.evaluation.formulas import Column, OfShares
from distill.evaluation.metrics import columns_of, find_metric, is_share
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
    """The units of the bootstrap: rows, or the documents that several rows belong to, with all of these."""

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


class Draws:
    """One metric of every arm, on all rows and on the same draws of them."""

    def __init__(self, name: str, rows: Mapping[str, Rows], values: Mapping[str, float | None], units: int):
        self.name, self.units = name, units
        self.values = values
        """Arm -> value on all rows; None where it is not finite."""
        self.note = ""
        """Reason that there are fewer draws than asked for."""
        self._metrics = {arm: on_rows(name, own) for arm, own in rows.items()}
        self._drawn: list[list[float]] = []
        self._seconds = SECONDS

    def add(self, index: Column) -> None:
        """Compute the metric of every arm on drawn rows, unless it failed or took too long before."""
        if self.note:
            return
        start = time.perf_counter()
        try:
            self._drawn.append([metric(index) for metric in self._metrics.values()])
        except Exception as error:  # in a function of the user's own; the figure itself is there
            self._drawn, self.note = [], f"it fails on drawn rows: {type(error).__name__}: {error}"
        self._seconds -= time.perf_counter() - start
        if self._seconds < 0 and not self.note:
            self.note = f"slow to compute: {len(self._drawn)} draws in {SECONDS:g} s"

    @cached_property
    def drawn(self) -> dict[str, Column]:
        """Arm -> value on each draw; nan where it is not finite."""
        values = np.array(self._drawn, dtype=float).reshape(-1, len(self._metrics))
        return dict(zip(self._metrics, np.where(np.isfinite(values), values, np.nan).T, strict=True))

    def of(self, arm: str) -> Interval:
        """Bound the figure of an arm."""
        value = self.values[arm]
        if arm == "teacher" and self.name in TEACHER_METRICS:
            return _none("the teacher against itself")
        if value is None:
            return _none("not finite")
        return self._bound(value, self.drawn[arm], "Wilson", wilson_interval, value)

    def between(self, arm: str, other: str) -> Interval:
        """Subtract the figure of another arm, and bound the difference."""
        ours, theirs = self.values[arm], self.values[other]
        if ours is None or theirs is None:
            return {"value": None, **_none("one of the two is not finite")}
        drawn = self.drawn[arm] - self.drawn[other]
        return {
            "value": ours - theirs,
            **self._bound(ours - theirs, drawn, "Newcombe", newcombe_interval, ours, theirs),
        }

    def _bound(
        self, value: float, drawn: Column, by: str, closed_form: Callable[..., tuple[float, float]], *shares: float
    ) -> Interval:
        """Bound a value by its draws or, where they cannot tell, shares by a closed form, which `by` names."""
        finite = drawn[~np.isnan(drawn)]
        lost = f"not finite on {len(drawn) - len(finite)} of {len(drawn)} draws" if len(finite) < len(drawn) else ""
        if self.units < FEW:
            reason = f"n too small: {self.units}"
        elif len(drawn) < LEAST:
            reason = self.note
        elif len(finite) < LEVEL * len(drawn):
            reason = lost
        else:
            low, high = percentile_interval(value, finite)
            if low < high:
                note = "; ".join(filter(None, (self.note, lost)))
                return {"low": low, "high": high, "by": f"bootstrap of {len(drawn)}"} | ({"note": note} if note else {})
            reason = "the same on every draw"
        # A word error rate may be above 1, which no share is; sums of floats may be by a rounding error.
        if not is_share(self.name) or not all(0 <= round(share, 9) <= 1 for share in shares):
            return _none(reason)
        low, high = closed_form(*shares, self.units)
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


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Bound a share of n by Wilson's score interval (1927), which has a width at 0 and at 1 as well."""
    share = min(max(share, 0.0), 1.0)
    middle, scale = share + Z**2 / (2 * n), 1 + Z**2 / n
    spread = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def newcombe_interval(ours: float, theirs: float, n: int) -> tuple[float, float]:
    """Bound the difference of two shares of n by those of each (Newcombe 1998, method 10), as if they were apart."""
    (low, high), (their_low, their_high) = wilson_interval(ours, n), wilson_interval(theirs, n)
    down, up = math.hypot(ours - low, their_high - theirs), math.hypot(high - ours, theirs - their_low)
    return ours - theirs - down, ours - theirs + up


def on_rows(name: str, columns: Rows) -> Callable[[Column], float]:
    """Make a function that computes a metric of one arm on drawn rows; shares of rows are computed once, here."""
    function = find_metric(name, columns)
    parts = [columns[column] for column in columns_of(function)]
    if isinstance(function, OfShares):
        parts, function = [function.shares(*parts)], function.total
    return lambda index: float(function(*(part[index] for part in parts)))


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
    with warnings.catch_warnings():  # what is undefined on a draw is counted
        warnings.simplefilter("ignore")
        found = {name: Draws(name, rows, {arm: values[arm][name] for arm in rows}, len(units)) for name in names}
        for index in units.draws():
            for draws in found.values():
                draws.add(index)
    return found

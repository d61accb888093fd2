"""One evaluation over several seeds: the mean of each figure of a trained arm, and how far the seeds are apart."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]
"""The arms of one evaluation.json."""


def spread_over(tables: Sequence[Rows]) -> dict[str, dict[str, Any]]:
    """Summarise the arms that every seed has, by arm and metric: `values` by seed, `mean`, `min` and `max`.

    A figure that is not finite with one of the seeds has no mean.
    """
    by_seed = [{row["name"]: row["metrics"] for row in rows} for rows in tables]
    shared = [name for name in by_seed[0] if all(name in own for own in by_seed)]
    return {
        name: {metric: _spread([own[name][metric] for own in by_seed]) for metric in by_seed[0][name]}
        for name in shared
    }


def _spread(values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    found = [statistics.fmean(known), min(known), max(known)] if len(known) == len(values) else [None] * 3
    return {"values": values, **dict(zip(("mean", "min", "max"), found, strict=True))}

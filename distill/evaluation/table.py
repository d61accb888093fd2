"""Content of evaluation.json: every arm on every metric, what it keeps of the teacher, and its spread over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from distill.evaluation.arms import ARMS
from distill.evaluation.classes import tabulate_classes
from distill.evaluation.intervals import LEVEL, SEED, draw_metrics, units_of
from distill.evaluation.metrics import compute, higher_is_better
from distill.evaluation.predict import Rows
from distill.recipe.names import TEACHER_METRICS


def finite_or_none(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Make metrics fit for JSON: None where a value is not finite, e.g. the perplexity of a broken student."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def tabulate(
    rows: Mapping[str, Rows],
    names: Sequence[str],
    steps: int,
    classes: Sequence[str] = (),
    unit: str = "examples",
    titles: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Compute the named metrics of each arm of a set from its rows, with intervals.

    Args:
        rows: Arm -> columns, of the same rows in each.
        names: Metrics.
        steps: Length of the training.
        classes: Names of the classes that predictions number.
        unit: Name of what a row is.
        titles: Words for arms in tables; None: their names.

    Returns:
        JSON-able `arms`; `differences`, of `distilled` from every other arm on the same draws; `drawn`, what is drawn
        and how many of it there are; and `per_class`, None where nothing is classified.
    """
    units, unit = units_of(next(iter(rows.values())), unit)
    metrics = {arm: finite_or_none(compute(names, own)) for arm, own in rows.items()}
    draws = draw_metrics(rows, metrics, names, units)

    def subtract(other: str) -> dict[str, Any]:
        against_itself = TEACHER_METRICS if other in ("teacher", "teachers") else ()
        own = {name: draws[name].between("distilled", other) for name in names if name not in against_itself}
        return {"arm": "distilled", "against": other, "metrics": own}

    return {
        "arms": [
            {
                "name": arm,
                "title": (titles or {}).get(arm, arm),
                "steps": 0 if ARMS[arm].terms is None else steps,
                "metrics": own,
                "intervals": {name: draws[name].of(arm) for name in names},
                "retained": retain(own, metrics.get("teacher", {}), metrics.get("majority", {})),
            }
            for arm, own in metrics.items()
        ],
        "differences": [subtract(arm) for arm in rows if arm != "distilled"] if "distilled" in rows else [],
        "drawn": {"unit": unit, "number": len(units), "level": LEVEL, "seed": SEED},
        "per_class": tabulate_classes(rows, classes, units),
    }


def retain(
    metrics: Mapping[str, float | None], teacher: Mapping[str, float | None], chance: Mapping[str, float | None]
) -> dict[str, float]:
    """Compute the share of the teacher's lead over the majority that an arm keeps, where more of a metric is better.

    It is (arm - majority) / (teacher - majority), as an accuracy of one half is nothing among two classes. Without a
    majority there is none, nor where the teacher has no lead.
    """
    found = {}
    for name, value in metrics.items():
        top, least = teacher.get(name), chance.get(name)
        if higher_is_better(name) and value is not None and top is not None and least is not None and top > least:
            found[name] = (value - least) / (top - least)
    return found


def spread_over(tables: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Summarise the arms that every seed has, by arm and metric: `values` by seed, `mean`, `min` and `max`.

    A figure that is not finite with one of the seeds has no mean.

    Args:
        tables: The `arms` of `tabulate` with each seed.
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

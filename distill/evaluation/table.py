"""Content of evaluation.json: every arm on every metric, and what it keeps of the teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distill.evaluation.arms import ARMS
from distill.evaluation.metrics import compute, higher_is_better
from distill.evaluation.predict import Rows


def finite_or_none(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Make metrics fit for JSON: None where a value is not finite, e.g. the perplexity of a broken student."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def tabulate_arms(
    rows: Mapping[str, Rows], names: Sequence[str], steps: int, titles: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Compute the named metrics of each arm from its rows.

    Args:
        rows: By arm.
        names: Metrics.
        steps: Length of the training.
        titles: Words for arms in tables; None: their names.
    """
    metrics = {arm: finite_or_none(compute(names, own)) for arm, own in rows.items()}
    return [
        {
            "name": arm,
            "title": (titles or {}).get(arm, arm),
            "steps": 0 if ARMS[arm].terms is None else steps,
            "metrics": own,
            "retained": retain(own, metrics.get("teacher", {}), metrics.get("majority", {})),
        }
        for arm, own in metrics.items()
    ]


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

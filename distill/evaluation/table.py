"""Content of evaluation.json: every arm on every metric, and what it keeps of the teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distill.evaluation.arms import ARMS, Arm
from distill.evaluation.metrics import compute, higher_is_better
from distill.evaluation.predict import Rows


def finite_or_none(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Make metrics fit for JSON: None where a value is not finite, e.g. the perplexity of a broken student."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def tabulate_arms(
    rows: Mapping[str, Rows], names: Sequence[str], steps: int, arms: Mapping[str, Arm] = ARMS
) -> list[dict[str, Any]]:
    """Compute the named metrics of each arm from its rows; `steps` is the length of the training."""
    metrics = {arm: finite_or_none(compute(names, own)) for arm, own in rows.items()}
    return [
        {
            "name": arm,
            "title": arms[arm].title,
            "steps": 0 if arms[arm].terms is None else steps,
            "metrics": own,
            "retained": retain(own, metrics.get("teacher", {})),
        }
        for arm, own in metrics.items()
    ]


def retain(metrics: Mapping[str, float | None], teacher: Mapping[str, float | None]) -> dict[str, float]:
    """Compute the share of the teacher's value that an arm keeps, for metrics where more is better."""
    return {
        name: value / reference
        for name, value in metrics.items()
        if higher_is_better(name) and value is not None and (reference := teacher.get(name) or 0.0) > 0
    }

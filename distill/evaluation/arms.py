"""The evaluation table: teacher, student as cut, distilled student and the labels-only control, measured alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distill.evaluation.metrics import HIGHER_IS_BETTER

AGAINST_TEACHER = ("agreement", "kl")
"""Measured for every arm, whatever the recipe asks for."""


def measured(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON can hold them: None where a value is not finite, e.g. the perplexity of a broken student."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def arm_row(name: str, steps: int, metrics: Mapping[str, float | None]) -> dict[str, Any]:
    """One row of the table, before `retained` is known."""
    return {"name": name, "steps": steps, "metrics": dict(metrics)}


def with_retained(arms: Sequence[dict[str, Any]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Add to each row the share of the teacher's score that it keeps, for metrics where more is better."""
    teacher = next((arm["metrics"] for arm in arms if arm["name"] == "teacher"), None)
    if teacher is None:
        return [{**arm, "retained": {}} for arm in arms]
    shared = [name for name in metrics if HIGHER_IS_BETTER.get(name, True) and teacher.get(name)]
    return [{**arm, "retained": _shares(arm["metrics"], teacher, shared)} for arm in arms]


def _shares(own: Mapping[str, Any], teacher: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    return {name: own[name] / teacher[name] for name in names if own[name] is not None}

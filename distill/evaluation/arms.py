"""The evaluation table: teacher, student as cut, distilled student and the labels-only control, measured alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.evaluation.metrics import HIGHER_IS_BETTER

AGAINST_TEACHER = ("agreement", "kl")
"""Measured for every arm, whatever the recipe asks for."""


def arm_row(name: str, steps: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    """One row of the table, before `retained` is known."""
    return {"name": name, "steps": steps, "metrics": dict(metrics)}


def with_retained(arms: Sequence[dict[str, Any]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Add to each row the share of the teacher's score that it keeps, for metrics where more is better."""
    teacher = next((arm["metrics"] for arm in arms if arm["name"] == "teacher"), None)
    if teacher is None:
        return [{**arm, "retained": {}} for arm in arms]
    shared = [name for name in metrics if HIGHER_IS_BETTER.get(name, True) and teacher.get(name)]
    return [{**arm, "retained": {name: arm["metrics"][name] / teacher[name] for name in shared}} for arm in arms]

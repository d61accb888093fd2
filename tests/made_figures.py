"""Figures as they stand in evaluation.json."""

from __future__ import annotations

from typing import Any


def difference(against: str, **metrics: tuple[float, float | None, float]) -> dict[str, Any]:
    """Make the differences of the distilled student from another arm: (value, low, high) of each metric."""
    found = {name: dict(zip(("value", "low", "high"), ends, strict=True)) for name, ends in metrics.items()}
    return {"arm": "distilled", "against": against, "metrics": found}

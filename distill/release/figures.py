"""The figures of an evaluation, by name: what is shown or compared of evaluation.json."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from distill.release.wording import as_number


@dataclass(frozen=True)
class Figures:
    """The figures of a finished evaluation."""

    evaluation: dict[str, Any]
    """Content of evaluation.json."""

    @property
    def primary(self) -> str:
        """The metric that the arms are judged by."""
        return str(self.evaluation["primary"])

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """The measured arms by name."""
        return {arm["name"]: arm for arm in self.evaluation["arms"]}

    @property
    def metric_names(self) -> list[str]:
        """The metrics of every arm, the primary one first."""
        return list(self.evaluation["metrics"])

    @property
    def measured_on(self) -> str:
        """Names of the sources that the test rows are from, without those of other training rows."""
        data = self.evaluation["data"]
        return str(data.get("measured_on", data["source"]))

    @property
    def elsewhere(self) -> dict[str, Self]:
        """The same run measured on other texts, by their name in `evaluation.sets`."""
        sets, seeds = self.evaluation.get("sets") or {}, self.evaluation.get("seeds") or {}
        spread = {name: {**seeds, "arms": own} for name, own in seeds.get("sets", {}).items()}
        return {
            name: replace(self, evaluation={**self.evaluation, **own, "seeds": spread.get(name)})
            for name, own in sets.items()
        }

    @property
    def trained_on(self) -> str:
        """Say how a set was trained on; empty: it was not, as far as sources and rows tell."""
        found = self.evaluation.get("trained_on") or {}
        reasons = ["from the source of the training rows"] if found.get("same_source") else []
        if found.get("rows"):
            reasons.append(f"{found['rows']:,} of its {found['of']:,} rows are training rows")
        return ", ".join(reasons)

    def title(self, arm: str) -> str:
        """Words for an arm in tables: those of evaluation.json, or its name."""
        return str(get_in(self.arms, arm, "title") or arm)

    def score(self, arm: str, metric: str | None = None) -> float | None:
        """Value of one arm (of the primary metric by default); None when it was not measured or is not finite."""
        return as_number(get_in(self.arms, arm, "metrics", metric or self.primary))

    def interval(self, arm: str, metric: str) -> dict[str, Any]:
        """Return `low` and `high` of an arm's metric, None where there are none, and a `note`."""
        return get_in(self.arms, arm, "intervals", metric) or {}

    def difference(self, against: str, metric: str | None = None) -> dict[str, Any]:
        """Return `value`, `low` and `high` of the distilled student less another arm, on the same draws of rows."""
        pairs = {pair["against"]: pair["metrics"] for pair in self.evaluation.get("differences", [])}
        return get_in(pairs, against, metric or self.primary) or {}

    def retained(self, arm: str, metric: str) -> float | None:
        """Share of the teacher's lead over the majority that an arm keeps; None for these two."""
        return None if arm in ("teacher", "majority") else as_number(get_in(self.arms, arm, "retained", metric))

    def over_seeds(self, arm: str, count: int = 1) -> list[float | None]:
        """Primary metric of an arm with each seed; of an arm that no seed changes `count` times."""
        values = get_in(self.evaluation, "seeds", "arms", arm, self.primary, "values")
        return [self.score(arm)] * count if values is None else [as_number(value) for value in values]

    @property
    def retained_note(self) -> str:
        """Words for the shares in brackets; empty where there are none, as without the majority."""
        words = "In brackets: share of the teacher's lead over the majority, (arm - majority) / (teacher - majority)."
        return words if any(arm.get("retained") for arm in self.arms.values()) else ""

    @property
    def direction(self) -> int:
        """1 where more of the primary metric is better, as it is unless the evaluation says otherwise, else -1."""
        return 1 if self.evaluation["higher_is_better"].get(self.primary, True) else -1

    def efficiency(self, model: str, *path: str) -> float | None:
        """One figure of one model, e.g. `efficiency("student", "latency_ms", "p50")`."""
        return as_number(get_in(self.evaluation, "efficiency", "models", model, *path))

    def ratio(self, key: str, model: str = "student") -> Any:
        """Student ÷ teacher as measured: a number, a {median, min, max}, or None."""
        return get_in(self.evaluation, "efficiency", "ratios", model, key)


def get_in(value: Any, *path: str) -> Any:
    """Follow a path of keys; None where it ends early."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value

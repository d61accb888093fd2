"""What is known about a finished run, and how its numbers are written: the one source of the card and of the report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from distill.models.plan import StudentPlan
from distill.recipe.schema import Format, Recipe

MISSING = "\N{EN DASH}"
SHARES = ("accuracy", "agreement", "exact_match", "f1", "precision", "recall")
"""Metrics whose name starts like this are shares of 1 and are written as percentages."""


@dataclass(frozen=True)
class Evidence:
    """JSON-like and free of absolute paths: whatever is in here may be published."""

    recipe: Recipe
    """For figures and settings; its paths are never shown, those of `recipe_text` and `teacher` are."""
    recipe_text: str
    """YAML of the recipe, as released."""
    plan: StudentPlan
    """What was kept of the teacher."""
    evaluation: dict[str, Any]
    """`data`, `metrics`, `primary`, `higher_is_better`, `arms` and `efficiency` (or null), as in evaluation.json."""
    metrics: list[dict[str, Any]]
    """Records of metrics.jsonl of the distilled student."""
    control_metrics: list[dict[str, Any]]
    """The same of the `labels_only` control; may be empty."""
    teacher: dict[str, Any]
    """`model` as the recipe names it, `revision`, `sha256`, `model_type`, `fitted`."""
    environment: dict[str, Any]
    """Versions, device and number of processes."""
    auto_class: str
    """Class of transformers that loads the student."""
    form: Format = "uniform"
    """Format of the release."""
    command: str = "distill run recipe.yaml"
    """Reproduces the run, from the folder of the release."""
    repair: dict[str, Any] | None = None
    """`calibration`, `held_out` and `steps`, as in repair.json; None where nothing was repaired."""

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
        """Every metric of any arm, the evaluation's own first."""
        found = [name for arm in self.arms.values() for name in arm["metrics"]]
        own = [name for name in self.evaluation["metrics"] if name in found]
        return list(dict.fromkeys(own + found))

    def score(self, arm: str, metric: str | None = None) -> float | None:
        """Value of one arm (of the primary metric by default); None when it was not measured or is not finite."""
        return finite(dig(self.arms, arm, "metrics", metric or self.primary))

    def retained(self, arm: str, metric: str) -> float | None:
        """Share of the teacher's value that an arm reaches."""
        return None if arm == "teacher" else finite(dig(self.arms, arm, "retained", metric))

    def higher_is_better(self, metric: str) -> bool:
        """Direction of a metric; higher is better unless the evaluation says otherwise."""
        return bool(self.evaluation["higher_is_better"].get(metric, True))

    def efficiency(self, model: str, *path: str) -> float | None:
        """One figure of one model, e.g. `efficiency("student", "latency_ms", "p50")`."""
        return finite(dig(self.evaluation, "efficiency", "models", model, *path))

    def ratio(self, key: str, model: str = "student") -> Any:
        """Student ÷ teacher as measured: a number, a {median, min, max}, or None."""
        return dig(self.evaluation, "efficiency", "ratios", model, key)


def dig(value: Any, *path: str) -> Any:
    """What lies at the end of a path of keys; None where the path ends early."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def finite(value: Any) -> float | None:
    """The value as a float, or None when it is not a number that can be written or drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and abs(value) < 1e100 else None


def plain(value: Any) -> str:
    """Text on one line without control, format or surrogate characters, which break XML, Markdown tables and trust."""
    return "".join(letter for letter in " ".join(str(value).split()) if letter.isprintable())


def number(value: Any) -> str:
    """Four significant digits, and all digits before the decimal point."""
    known = finite(value)
    if known is None:
        return MISSING
    return f"{known:,.0f}" if 1e3 <= abs(known) < 1e15 else f"{known:.4g}"


def percent(value: Any) -> str:
    """A share of 1 as a percentage."""
    known = finite(value)
    return MISSING if known is None else f"{100 * known:.1f} %"


def quantity(value: Any, units: str = "kMBT") -> str:
    """Three or more digits and a unit: 22.7 M; `kMGT` gives the units of FLOPs."""
    known = finite(value)
    if known is None:
        return MISSING
    for power, unit in reversed(list(enumerate(units, start=1))):
        if abs(known) >= 1000**power:
            return f"{known / 1000**power:.1f} {unit}"
    return f"{known:.4g}"


def megabytes(value: Any) -> str:
    """Bytes as MB (10⁶)."""
    known = finite(value)
    return MISSING if known is None else f"{known / 1e6:.1f} MB"


def times(value: Any) -> str:
    """A ratio, with its range when it was measured several times."""
    if isinstance(value, dict):
        low, high = finite(value.get("min")), finite(value.get("max"))
        span = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
        return times(value.get("median")) + span
    known = finite(value)
    return MISSING if known is None else f"{known:.2f}x"


def is_share(metric: str) -> bool:
    """Whether a metric is written as a percentage."""
    return metric.startswith(SHARES)


def measured(metric: str, value: Any) -> str:
    """The value of a metric."""
    return percent(value) if is_share(metric) else number(value)


def difference(metric: str, value: float) -> str:
    """The distance between two values of a metric."""
    return f"{100 * value:.1f} points" if is_share(metric) else number(value)


@dataclass(frozen=True)
class Finding:
    """One plain sentence about the result."""

    good: bool
    """False: the reader should be careful."""
    text: str


def summary(evidence: Evidence) -> str:
    """What was cut from what, and what it costs and keeps, in one sentence."""
    plan, metric = evidence.plan, evidence.primary
    share = sum(plan.widths) / sum(layer.teacher_width for layer in plan.layers)
    depth = f"{len(plan.layers)} of its teacher's {plan.teacher_layers} layers"
    text = f"keeps {depth} and {percent(share)} of their MLP neurons"
    facts = []
    student, teacher = evidence.efficiency("student", "parameters"), evidence.efficiency("teacher", "parameters")
    if student and teacher:
        facts.append(f"{quantity(student)} parameters instead of {quantity(teacher)} ({percent(student / teacher)})")
    score, reference = evidence.score("distilled"), evidence.score("teacher")
    if score is not None and reference is not None:
        facts.append(f"{metric} {measured(metric, score)} against the teacher's {measured(metric, reference)}")
    elif score is not None:
        facts.append(f"{metric} {measured(metric, score)}")
    if evidence.ratio("throughput") is not None:
        facts.append(f"{times(evidence.ratio('throughput'))} the teacher's throughput")
    return f"{text}: {', '.join(facts)}." if facts else f"{text}."


RIVALS = {
    "labels_only": "the same student trained for the same steps without the teacher",
    "cut": "the student before training",
    "repaired": "the student after its repair, before training",
}


def findings(evidence: Evidence) -> list[Finding]:
    """Whether the distilled student beats its controls; said just as plainly when it does not."""
    score = evidence.score("distilled")
    if score is None:
        return [Finding(False, "The distilled student was not measured, so nothing is known about its quality.")]
    rivals = {rival: what for rival, what in RIVALS.items() if rival != "repaired" or evidence.repair}
    return [_comparison(evidence, score, rival, what) for rival, what in rivals.items()]


def _comparison(evidence: Evidence, score: float, rival: str, what: str) -> Finding:
    """One rival against the distilled student on the primary metric."""
    metric, other = evidence.primary, evidence.score(rival)
    if other is None:
        return Finding(False, f"{rival} ({what}) was not measured: what distillation adds over it is unknown.")
    figures = f"{metric} {measured(metric, score)} against {measured(metric, other)}"
    margin = (score - other) * (1 if evidence.higher_is_better(metric) else -1)
    if margin <= 0:
        return Finding(False, f"The distilled student does not beat {rival}, {what}: {figures}.")
    error = standard_error(evidence, score)
    if error is not None and margin <= error:
        doubt = f"within one standard error ({difference(metric, error)}) of this test set, so this is a tie"
        return Finding(False, f"The distilled student is only just ahead of {rival}, {what}: {figures}, {doubt}.")
    return Finding(True, f"The distilled student beats {rival}, {what}, by {difference(metric, margin)}: {figures}.")


def standard_error(evidence: Evidence, score: float) -> float | None:
    """Of an accuracy over examples: sqrt(p (1 - p) / n). None for metrics that are no mean of hits."""
    examples = finite(evidence.evaluation["data"].get("examples"))
    known = evidence.primary == "accuracy" and evidence.auto_class == "AutoModelForSequenceClassification"
    return math.sqrt(score * (1 - score) / examples) if known and examples and 0 <= score <= 1 else None

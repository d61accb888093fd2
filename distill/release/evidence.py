"""A finished run as the release sees it: the one source of the figures of card and report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from distill.models.plan import StudentPlan
from distill.recipe.schema import Format, Recipe
from distill.release.wording import (
    as_number,
    format_count,
    format_difference,
    format_metric,
    format_percent,
    format_ratio,
)


@dataclass(frozen=True)
class Evidence:
    """A finished run, JSON-like and free of absolute paths: everything in here may be published."""

    recipe: Recipe
    """For figures and settings; its paths are never shown, those of `recipe_text` and `teacher` are."""
    recipe_text: str
    """YAML of the recipe, as released."""
    plan: StudentPlan
    """The layers and neurons that were kept of the teacher."""
    evaluation: dict[str, Any]
    """Content of evaluation.json."""
    records: Mapping[str, list[dict[str, Any]]]
    """Trained arm -> records of its metrics.jsonl."""
    teacher: dict[str, Any]
    """`model` as the recipe names it, `revision`, `sha256`, `model_type`, `fitted`."""
    environment: dict[str, Any]
    """Versions, device and number of ranks."""
    auto_class: str
    """Class of transformers that loads the student."""
    release_format: Format = "uniform"
    sample: Sequence[str] = ("Some text.",)
    """What the card gives to the tokenizer: a text, or a pair of texts."""
    command: str = "distill run recipe.yaml"
    """Reproduces the run, from the folder of the release."""
    pattern_note: str = ""
    """Software that computes another model than config.json describes; empty: none that is known."""
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
        """The metrics of every arm, the primary one first."""
        return list(self.evaluation["metrics"])

    @property
    def measured_on(self) -> str:
        """Names of the sources that the test rows are from, without those of other training rows."""
        data = self.evaluation["data"]
        return str(data.get("measured_on", data["source"]))

    @property
    def elsewhere(self) -> dict[str, Evidence]:
        """The same run with its arms measured on other texts, by their name in `data.also`."""
        also = self.evaluation.get("also") or {}
        seeds = self.evaluation.get("seeds") or {}
        spread = {name: {**seeds, "arms": own} for name, own in seeds.get("also", {}).items()}
        return {
            name: replace(self, evaluation={**self.evaluation, "arms": arms, "seeds": spread.get(name)})
            for name, arms in also.items()
        }

    def title(self, arm: str) -> str:
        """Words for an arm in tables: those of evaluation.json, or its name."""
        return str(get_in(self.arms, arm, "title") or arm)

    def score(self, arm: str, metric: str | None = None) -> float | None:
        """Value of one arm (of the primary metric by default); None when it was not measured or is not finite."""
        return as_number(get_in(self.arms, arm, "metrics", metric or self.primary))

    def retained(self, arm: str, metric: str) -> float | None:
        """Share of the teacher's lead over the majority that an arm keeps; None for these two."""
        return None if arm in ("teacher", "majority") else as_number(get_in(self.arms, arm, "retained", metric))

    def over_seeds(self, arm: str, count: int) -> list[float | None]:
        """Primary metric of an arm with each seed; of an arm that no seed changes, or of one seed, `count` times."""
        values = get_in(self.evaluation, "seeds", "arms", arm, self.primary, "values")
        return [self.score(arm)] * count if values is None else [as_number(value) for value in values]

    @property
    def retained_note(self) -> str:
        """Words for the shares in brackets; empty where there are none, as without the majority."""
        if not any(arm.get("retained") for arm in self.arms.values()):
            return ""
        return "In brackets: share of the teacher's lead over the majority, (arm - majority) / (teacher - majority)."

    def higher_is_better(self, metric: str) -> bool:
        """Direction of a metric; higher is better unless the evaluation says otherwise."""
        return bool(self.evaluation["higher_is_better"].get(metric, True))

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


@dataclass(frozen=True)
class Verdict:
    """One plain sentence about the result."""

    good: bool
    """False: the reader should be careful."""
    text: str


def summarize(evidence: Evidence) -> str:
    """Say in one sentence what is left of the teacher, and at which size, score and speed."""
    plan, metric = evidence.plan, evidence.primary
    share = sum(plan.widths) / sum(layer.teacher_width for layer in plan.layers)
    depth = f"{len(plan.layers)} of its teacher's {plan.teacher_layers} layers"
    text = f"keeps {depth} and {format_percent(share)} of their MLP neurons"
    facts = []
    student, teacher = evidence.efficiency("student", "parameters"), evidence.efficiency("teacher", "parameters")
    if student and teacher:
        counts = f"{format_count(student)} parameters instead of {format_count(teacher)}"
        facts.append(f"{counts} ({format_percent(student / teacher)})")
    score, reference = evidence.score("distilled"), evidence.score("teacher")
    if score is not None:
        against = "" if reference is None else f" against the teacher's {format_metric(metric, reference)}"
        facts.append(f"{metric} {format_metric(metric, score)}{against}")
    if evidence.ratio("throughput") is not None:
        facts.append(f"{format_ratio(evidence.ratio('throughput'))} the teacher's throughput")
    return f"{text}: {', '.join(facts)}." if facts else f"{text}."


def judge(evidence: Evidence) -> list[Verdict]:
    """Say whether the distilled student beats each rival, just as plainly when it does not, and which were not run."""
    score = evidence.score("distilled")
    if score is None:
        return [Verdict(False, "The distilled student was not measured, so nothing is known about its quality.")]
    rivals, left = evidence.evaluation.get("rivals", {}), evidence.evaluation.get("not_run") or {}
    compare = _compare_over_seeds if len(evidence.over_seeds("distilled", 1)) > 1 else _compare
    verdicts = [compare(evidence, score, rival, words) for rival, words in rivals.items()]
    if left:
        names = ", ".join(f"{name} ({why})" for name, why in left.items())
        verdicts.append(Verdict(False, f"Not run: {names}. What the student adds over these is not known."))
    return verdicts


def _compare(evidence: Evidence, score: float, rival: str, words: str) -> Verdict:
    """Judge the distilled student against one rival on the primary metric."""
    metric, other = evidence.primary, evidence.score(rival)
    if other is None:
        return Verdict(False, f"{rival} ({words}) has no figure: what distillation adds over it is unknown.")
    figures = f"{metric} {format_metric(metric, score)} against {format_metric(metric, other)}"
    margin = (score - other) * (1 if evidence.higher_is_better(metric) else -1)
    if margin <= 0:
        return Verdict(
            False, f"The distilled student does not beat {rival}, {words}: {figures}.{lesson(evidence, rival)}"
        )
    error = standard_error(evidence, score)
    if error is not None and margin <= error:
        doubt = f"within one standard error ({format_difference(metric, error)}) of this test set, so this is a tie"
        text = f"The distilled student is only just ahead of {rival}, {words}: {figures}, {doubt}."
        return Verdict(False, text + lesson(evidence, rival, "As far as it tells,"))
    lead = format_difference(metric, margin)
    return Verdict(True, f"The distilled student beats {rival}, {words}, by {lead}: {figures}.")


def _compare_over_seeds(evidence: Evidence, _score: float, rival: str, words: str) -> Verdict:
    """Judge the distilled student of every seed against the rival of the same seed, or the one that no seed changes."""
    metric, ours = evidence.primary, evidence.over_seeds("distilled", 1)
    theirs = evidence.over_seeds(rival, len(ours))
    if None in ours or None in theirs:
        return Verdict(False, f"{rival} ({words}): not every seed has a figure, so what distillation adds is unknown.")
    sign = 1 if evidence.higher_is_better(metric) else -1
    margins = [sign * (own - other) for own, other in zip(ours, theirs, strict=True)]  # type: ignore[operator]
    ahead, mean = sum(margin > 0 for margin in margins), fmean(margins)
    span = ", ".join(f"{'-' if each < 0 else '+'}{format_difference(metric, abs(each))}" for each in margins)
    if ahead == len(margins):
        lead = f"by {format_difference(metric, mean)} of {metric} on average ({span})"
        return Verdict(True, f"The distilled student beats {rival}, {words}, with each of {ahead} seeds, {lead}.")
    often = f"only with {ahead} of {len(margins)} seeds" if ahead else f"with none of {len(margins)} seeds"
    text = f"The distilled student beats {rival}, {words}, {often}: {metric} {span}."
    return Verdict(False, text + (lesson(evidence, rival) if mean <= 0 else ""))


def lesson(evidence: Evidence, rival: str, start: str = "So") -> str:
    """Say what it means that a rival is not beaten; empty where nothing more is known."""
    words = get_in(evidence.evaluation, "lessons", rival)
    return f" {start} {words}." if words else ""


def standard_error(evidence: Evidence, score: float) -> float | None:
    """Compute that of an accuracy over examples: sqrt(p (1 - p) / n). None for metrics that are no mean of hits."""
    examples = as_number(evidence.evaluation["data"].get("examples"))
    known = evidence.primary == "accuracy" and evidence.auto_class == "AutoModelForSequenceClassification"
    return math.sqrt(score * (1 - score) / examples) if known and examples and 0 <= score <= 1 else None

"""A finished run as the release sees it: the one source of the figures of card and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from distill.models.plan import StudentPlan
from distill.recipe.schema import Format, Recipe
from distill.release.figures import Figures, get_in
from distill.release.wording import (
    as_number,
    format_count,
    format_difference,
    format_interval,
    format_metric,
    format_paired,
    format_percent,
    format_ratio,
)


@dataclass(frozen=True, kw_only=True)
class Evidence(Figures):
    """A finished run, JSON-like and free of absolute paths: everything in here may be published."""

    recipe: Recipe
    """For figures and settings; its paths are never shown, those of `recipe_text` and `teacher` are."""
    recipe_text: str
    """YAML of the recipe, as released."""
    plan: StudentPlan
    """The layers and neurons that were kept of the teacher."""
    records: Mapping[str, list[dict[str, Any]]]
    """Trained arm -> records of its metrics.jsonl."""
    teacher: dict[str, Any]
    """`model` as the recipe names it, `revision`, `sha256`, `model_type`, `fitted`."""
    environment: dict[str, Any]
    """Versions, device and number of ranks."""
    auto_class: str
    """Class of transformers that loads the student."""
    stages: Sequence[Mapping[str, Any]] = ()
    """`stage`, `seconds` and `peak_bytes` of each, in their order."""
    fit: Sequence[dict[str, Any]] = ()
    """Records of the teacher's own training; none where it was not fitted."""
    release_format: Format = "uniform"
    sample: Sequence[str] = ("Some text.",)
    """What the card gives to the tokenizer: a text, or a pair of texts."""
    command: str = "distill run recipe.yaml"
    """Reproduces the run, from the folder of the release."""
    printed: Mapping[str, str] = field(default_factory=dict)
    """What each example of the card printed, by its title; none of those that were not run."""
    pattern_note: str = ""
    """Software that computes another model than config.json describes; empty: none that is known."""
    student: Mapping[str, Any] = field(default_factory=dict)
    """Of a student that was given: `model` as the recipe names it, `revision`, `sha256`, `model_type`."""
    repair: dict[str, Any] | None = None
    """`calibration`, `held_out` and `steps`, as in repair.json; None where nothing was repaired."""

    @property
    def teachers(self) -> list[dict[str, Any]]:
        """Model, weight and sources of each of several teachers; empty: there is one."""
        return list(self.evaluation.get("taught_by") or [])


@dataclass(frozen=True)
class Verdict:
    """One plain sentence about the result."""

    good: bool
    """False: the reader should be careful."""
    text: str


def _left(plan: StudentPlan) -> str:
    share = sum(plan.widths) / sum(layer.teacher_width for layer in plan.layers)
    depth = f"{len(plan.layers)} of its teacher's {plan.teacher_layers} layers"
    return f"keeps {depth} and {format_percent(share)} of their MLP neurons"


def _origin(evidence: Evidence) -> str:
    plan = evidence.plan
    own, theirs = evidence.student.get("model_type"), f"a {plan.model_type} of {plan.teacher_layers} layers"
    start = f"{evidence.student.get('model')}, a {own} of {len(plan.layers)} layers"
    return f"was not cut from its teacher: it starts from {start}, and is taught by {theirs}"


def describe_origin(evidence: Evidence) -> str:
    """Say where a student that was given comes from, and which layers it is compared with; empty: it was cut."""
    plan = evidence.plan
    if plan.given is None:
        return ""
    own, theirs = plan.given.hidden_size, plan.given.teacher_hidden_size
    widths = f"Hidden states are {own} wide, as the teacher's"
    if own != theirs:
        widths = f"Hidden states are {own} wide and the teacher's {theirs}; learned maps between them are not released"
    pairs = {
        "rule": "Its layers were never the teacher's: they are paired with the ends of equal spans of these",
        "plan": "An earlier run cut it from this teacher, and its plan says which layer each of its layers was",
    }
    return f"The student {_origin(evidence)}. {pairs[plan.given.map]}. {widths}."


def summarize(evidence: Evidence) -> str:
    """Say in one sentence what is left of the teacher, and at which size, score and speed."""
    plan, metric = evidence.plan, evidence.primary
    text = _origin(evidence) if plan.given else _left(plan)
    facts = []
    student, teacher = evidence.efficiency("student", "parameters"), evidence.efficiency("teacher", "parameters")
    if student and teacher:
        counts = f"{format_count(student)} parameters instead of {format_count(teacher)}"
        facts.append(f"{counts} ({format_percent(student / teacher)})")
    score, reference = evidence.score("distilled"), evidence.score("teacher")
    if score is not None:
        interval = format_interval(metric, evidence.interval("distilled", metric))
        fact = f"{metric} {format_metric(metric, score)}{interval}"
        if reference is not None:
            less = format_paired(metric, evidence.difference("teacher"))
            fact += f" against the teacher's {format_metric(metric, reference)}{less and f' (a difference of {less})'}"
        facts.append(fact)
        facts += _gain(evidence)
    if evidence.ratio("throughput") is not None:
        low, high = (as_number(get_in(evidence.ratio("throughput"), end)) for end in ("min", "max"))
        unclear = low is not None and high is not None and low <= 1 <= high
        facts.append(
            f"a throughput that is not shown to differ from the teacher's ({low:.2f}x to {high:.2f}x)"
            if unclear
            else f"{format_ratio(evidence.ratio('throughput'))} the teacher's throughput"
        )
    return f"{text}: {', '.join(facts)}." if facts else f"{text}."


def _gain(evidence: Evidence) -> list[str]:
    """Say what the teacher added over the first rival that was measured, the one that is most like the student."""
    for rival, words in evidence.evaluation.get("rivals", {}).items():
        if evidence.score(rival) is not None:
            shown, _ = _difference(evidence, rival, evidence.direction)
            if _compare(evidence, rival, words).good:
                return [f"better than {words}{shown and f' by {shown}'}"]
            if get_in(evidence.evaluation, "seeds"):
                return [f"a gain over {words} is not shown by every seed and the interval of the released one"]
            return [f"a gain over {words} is not shown{shown and f' ({shown})'}"]
    return []


def _difference(evidence: Evidence, against: str, sign: int) -> tuple[str, float | None]:
    """Write the student's difference from an arm with its interval, whose low end is returned as well.

    Both are turned round where the sign is -1.
    """
    pair = evidence.difference(against)
    value, low, high = (as_number(pair.get(key)) for key in ("value", "low", "high"))
    if sign < 0:
        value, low, high = (None if end is None else 0.0 - end for end in (value, high, low))  # and no -0.0
    return format_paired(evidence.primary, {"value": value, "low": low, "high": high}), low


def judge(evidence: Evidence) -> list[Verdict]:
    """Say whether the distilled student beats each rival, just as plainly when it does not, and which were not run."""
    if evidence.score("distilled") is None:
        return [Verdict(False, "The distilled student was not measured, so nothing is known about its quality.")]
    verdicts = [_compare(evidence, *rival) for rival in evidence.evaluation.get("rivals", {}).items()]
    if left := evidence.evaluation.get("not_run"):
        names = ", ".join(f"{name} ({why})" if why else name for name, why in left.items())
        verdicts.append(Verdict(False, f"Not run: {names}. What the student adds over these is not known."))
    return verdicts


def _compare(evidence: Evidence, rival: str, words: str) -> Verdict:
    """Judge the distilled student against one rival on the primary metric.

    Where there are several seeds it is judged seed by seed, else by the difference on the same draws of rows.
    """
    metric, ours = evidence.primary, evidence.over_seeds("distilled")
    theirs = evidence.over_seeds(rival, len(ours))
    pairs = [(own, other) for own, other in zip(ours, theirs, strict=False) if own is not None and other is not None]
    if len(pairs) < max(len(ours), len(theirs)):
        return Verdict(False, f"{rival} ({words}) has no figure: what distillation adds over it is unknown.")
    margins = [(own - other) * evidence.direction for own, other in pairs]
    ahead, lead = sum(margin > 0 for margin in margins), fmean(margins)
    figures = " against ".join(format_metric(metric, fmean(side)) for side in zip(*pairs, strict=True))
    each = ", ".join(f"{'-' if margin < 0 else '+'}{format_difference(metric, abs(margin))}" for margin in margins)
    figures = f"{metric} {figures}" + (f" on average over {len(pairs)} seeds ({each})" if len(pairs) > 1 else "")
    shown, low = _difference(evidence, rival, evidence.direction)
    against = f"{rival}, {words}"
    if lead <= 0:
        behind = f", a gain of {shown}" if shown and len(pairs) == 1 else ""
        text = f"The distilled student does not beat {against}: {figures}{behind}."
        return Verdict(False, text + _lesson(evidence, rival, "So"))
    if ahead < len(pairs):
        return Verdict(False, f"The distilled student beats {against}, with {ahead} of the seeds only: {figures}.")
    if low is None or low <= 0:  # other seeds do not tell what other examples would have given
        reason = f"a gain of {shown}, an interval that contains 0"
        if low is None:
            reason = f"and the difference has no interval ({evidence.difference(rival).get('note') or 'not computed'})"
        released = f"; that of the released seed is {reason}" if len(pairs) > 1 else f", {reason}"
        text = f"A gain over {against}, is not shown: {figures}{released}."
        return Verdict(False, text + _lesson(evidence, rival, "As far as it tells,"))
    if len(pairs) > 1:
        by = format_difference(metric, lead)
        return Verdict(True, f"The distilled student beats {against}, by {by}: {figures}.")
    return Verdict(True, f"The distilled student beats {against}, by {shown}: {figures}.")


def _lesson(evidence: Evidence, rival: str, start: str) -> str:
    words = get_in(evidence.evaluation, "lessons", rival)
    return f" {start} {words}." if words else ""


def judge_sets(evidence: Evidence) -> list[Verdict]:
    """Say on each other set of texts what is kept of the teacher; nothing of sets that were trained on."""
    found = []
    for name, own in evidence.elsewhere.items():
        metric, score, teacher = own.primary, own.score("distilled"), own.score("teacher")
        if own.trained_on:
            text = f"{name} was trained on ({own.trained_on}), so its figures say nothing about what was kept."
            found.append(Verdict(False, text))
        elif score is not None and teacher is not None:
            loss, low = _difference(own, "teacher", -own.direction)
            kept, words = False, f"worse than the teacher by {loss}"
            if low is None:
                words = "their difference has no interval"
            elif low <= 0:
                kept, words = True, f"no loss is shown, {loss}"
            figures = f"{metric} {format_metric(metric, score)} against the teacher's {format_metric(metric, teacher)}"
            found.append(Verdict(kept, f"On {name}, which was not trained on: {figures}; {words}."))
    return found

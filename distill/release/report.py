"""The report: one HTML page that shows a run. It fetches nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from distill.release import charts
from distill.release.card import ARMS, Table, caveats, tables
from distill.release.evidence import (
    Evidence,
    dig,
    findings,
    finite,
    is_share,
    measured,
    megabytes,
    number,
    percent,
    plain,
    quantity,
    summary,
    times,
)

STYLES = {"teacher": "teacher", "cut": "cut", "repaired": "c4", "distilled": "distilled", "labels_only": "labels"}
"""Arm -> class of the stylesheet."""
WIDE = 50
"""Values that differ by more than this factor are drawn on a logarithmic scale."""


@dataclass(frozen=True)
class Tile:
    """One headline figure."""

    name: str
    value: str
    note: str
    picture: Markup | None = None


@dataclass(frozen=True)
class Figure:
    """A chart and the sentence under it."""

    title: str
    picture: Markup
    caption: str


@dataclass(frozen=True)
class Section:
    """One part of an inspection: a table, the pictures of it, and what its columns mean."""

    title: str
    table: Table
    note: str
    figures: Sequence[Figure] = ()


def render_inspection(name: str, lead: str, sections: Sequence[Section]) -> str:
    """What `distill inspect` found, as one self-contained HTML page."""
    shown = [replace(section, figures=[figure for figure in section.figures if figure.picture]) for section in sections]
    return _pages().get_template("inspection.html.jinja").render(name=name, lead=lead, sections=shown)


def _pages() -> Environment:
    environment = Environment(
        loader=PackageLoader("distill.release"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = plain
    return environment


def render_report(evidence: Evidence) -> str:
    """One self-contained HTML page."""
    curves = [loss_curves(evidence), held_out(evidence), learning_rate(evidence)]
    return (
        _pages()
        .get_template("report.html.jinja")
        .render(
            evidence=evidence,
            summary=summary(evidence),
            findings=findings(evidence),
            caveats=caveats(evidence),
            tables=tables(evidence),
            this_arm=ARMS["distilled"],
            tiles=[tile for tile in (score(evidence), size(evidence), speed(evidence), agreement(evidence)) if tile],
            architecture=architecture(evidence),
            curves=[figure for figure in curves if figure.picture],
            arms=arms(evidence),
        )
    )


def score(evidence: Evidence) -> Tile | None:
    """The student on the primary metric."""
    metric, student, teacher = evidence.primary, evidence.score("distilled"), evidence.score("teacher")
    if student is None:
        return None
    if teacher is None:
        return Tile(metric, measured(metric, student), "the teacher was not measured")
    retained = evidence.retained("distilled", metric)
    share = "" if retained is None else f", {percent(retained)} retained"
    note = f"teacher {measured(metric, teacher)}{share}"
    return Tile(metric, measured(metric, student), note, charts.pair(teacher, student))


def size(evidence: Evidence) -> Tile:
    """Parameters, or layers when nothing was counted."""
    student, teacher = evidence.efficiency("student", "parameters"), evidence.efficiency("teacher", "parameters")
    if student is None or not teacher:
        deep, kept = evidence.plan.teacher_layers, len(evidence.plan.layers)
        return Tile("layers", str(kept), f"teacher {deep}", charts.pair(deep, kept))
    weights = evidence.efficiency("student", "bytes")
    note = f"teacher {quantity(teacher)}, {percent(student / teacher)} left"
    return Tile(
        "parameters",
        quantity(student),
        note + (f", {megabytes(weights)}" if weights else ""),
        charts.pair(teacher, student),
    )


def speed(evidence: Evidence) -> Tile | None:
    """Throughput against the teacher."""
    ratio = evidence.ratio("throughput")
    if ratio is None:
        return None
    student, teacher = evidence.efficiency("student", "throughput"), evidence.efficiency("teacher", "throughput")
    middle, _, span = times(ratio).partition(" ")
    note = f"{number(student)} against {number(teacher)} examples/s" + (f", range {span.strip('()')}" if span else "")
    return Tile("throughput", middle, note, charts.pair(teacher, student) if teacher and student else None)


def agreement(evidence: Evidence) -> Tile | None:
    """How often the student says what the teacher says."""
    value, before = evidence.score("distilled", "agreement"), evidence.score("cut", "agreement")
    if value is None:
        return None
    note = "same answer as the teacher" + ("" if before is None else f"; {percent(before)} before training")
    return Tile("agreement", percent(value), note, charts.pair(1.0, value))


def architecture(evidence: Evidence) -> Figure:
    """The teacher's layers, and those that live on in the student."""
    plan = evidence.plan
    kept = [charts.Kept(layer.teacher_layer, layer.teacher_width, layer.width) for layer in plan.layers]
    sources = ", ".join(str(index) for index in plan.kept_layers)
    title = f"{len(kept)} of {plan.teacher_layers} layers kept"
    description = (
        f"The student is made of teacher layers {sources}, with MLP widths {', '.join(map(str, plan.widths))}."
    )
    caption = (
        "Bar length: MLP width. Solid: neurons that live on in the student; pale: neurons pruned; dashed: layers "
        f"dropped. Layer policy {plan.layer_policy}, neuron score {plan.mlp_score}, allocation {plan.mlp_allocation}."
    )
    return Figure(
        "What was cut", charts.architecture(plan.teacher_layers, kept, title=title, description=description), caption
    )


def loss_curves(evidence: Evidence) -> Figure:
    """Draw the loss and each of its terms."""
    terms = dict.fromkeys(term for record in evidence.metrics for term in record.get("terms") or {})
    lines = [charts.Series("loss", points(evidence.metrics, "train", "loss"), "total")]
    for index, term in enumerate(terms):
        lines.append(charts.Series(term, points(evidence.metrics, "train", "terms", term), f"c{index % 6}"))
    wide = is_wide(value for line in lines for _, value in line.points)
    caption = f"Training loss and its terms{', logarithmic scale' if wide else ''}."
    picture = charts.line_chart(lines, title="Training loss", description=caption, log=wide)
    return Figure("Training loss", picture, caption)


def held_out(evidence: Evidence) -> Figure:
    """The primary metric on the held-out split while the student and its control learned."""
    metric = evidence.primary
    records = {"distilled": evidence.metrics, "labels_only": evidence.control_metrics}
    lines = [
        charts.Series(arm, points(found, "evaluate", "metrics", metric), STYLES[arm]) for arm, found in records.items()
    ]
    levels = scores(evidence, ["teacher", "cut", "repaired"])
    values = [value for each in lines for _, value in each.points] + [level.value for level in levels]
    caption = f"{metric} on the held-out split; teacher and untrained student as horizontal lines where measured."
    picture = charts.line_chart(
        lines,
        title=f"Held-out {metric}",
        description=caption,
        levels=levels,
        log=is_wide(values),
        write=round_percent if is_share(metric) else number,
    )
    return Figure(f"Held-out {metric}", picture, caption)


def round_percent(value: float) -> str:
    """Percentages of an axis, which are round."""
    return f"{100 * value:g} %"


def learning_rate(evidence: Evidence) -> Figure:
    """The schedule as it was run."""
    line = charts.Series("lr", points(evidence.metrics, "train", "lr"), "total")
    training = evidence.recipe.training
    caption = f"Learning rate: {training.schedule}, peak {number(training.lr)}."
    return Figure("Learning rate", charts.line_chart([line], title="Learning rate", description=caption), caption)


def arms(evidence: Evidence) -> Figure:
    """The primary metric of every arm, side by side."""
    metric = evidence.primary
    direction = "higher" if evidence.higher_is_better(metric) else "lower"
    bars = scores(evidence, evidence.arms)
    teacher = next((bar for bar in bars if bar.name == "teacher"), None)
    caption = f"{metric}, {direction} is better." + (" Dashed: the teacher." if teacher else "")
    title = f"Arms compared: {metric}"
    write = partial(measured, metric)
    picture = charts.bar_chart(bars, title=title, description=caption, mark=teacher, write=write)
    return Figure(title, picture, caption)


def scores(evidence: Evidence, names: Iterable[str]) -> list[charts.Bar]:
    """The primary metric of those arms that have it."""
    values = [(name, evidence.score(name)) for name in names]
    return [charts.Bar(name, value, STYLES.get(name, "cut")) for name, value in values if value is not None]


def points(records: list[dict[str, Any]], event: str, *path: str) -> list[charts.Point]:
    """(step, value) in order of steps. A resumed run repeats steps: the last record of a step counts."""
    found = {record.get("step"): dig(record, *path) for record in records if record.get("event") == event}
    pairs = ((finite(step), finite(value)) for step, value in found.items())
    return sorted((step, value) for step, value in pairs if step is not None and value is not None)


def is_wide(values: Iterable[float]) -> bool:
    """Whether the positive values ask for a logarithmic scale."""
    known = [value for value in values if value > 0]
    return bool(known) and max(known) > WIDE * min(known)

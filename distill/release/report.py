"""The report: one HTML page that shows a run. It fetches nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup

from distill.release import charts
from distill.release.card import context_of, make_environment
from distill.release.evidence import Evidence, describe_origin
from distill.release.figures import get_in
from distill.release.table import Table
from distill.release.wording import (
    EXPLAINED,
    as_number,
    format_count,
    format_megabytes,
    format_metric,
    format_number,
    format_percent,
    format_ratio,
    is_percentage,
    one_line,
)

COLOURS = ("c3", "c4", "c1", "c0", "c2", "c5")
"""Classes of the stylesheet for arms other than teacher and distilled, which have their own."""
NO_MODEL = ("majority", "teachers")
"""Arms without a size of their own."""
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


def render_report(evidence: Evidence, disagreements: Table | None = None) -> str:
    """Render one self-contained HTML page; with examples of the test texts only where it stays with the run."""
    environment = make_environment()
    environment.filters["one_line"] = one_line
    tiles = [score_tile(evidence), size_tile(evidence), speed_tile(evidence), agreement_tile(evidence)]
    curves = [loss_figure(evidence), held_out_figure(evidence), rate_figure(evidence), fit_figure(evidence)]
    return environment.get_template("report.html.jinja").render(
        **context_of(evidence),
        this_arm=evidence.title("distilled"),
        tiles=[tile for tile in tiles if tile],
        cuts=cut_figure(evidence),
        curves=[figure for figure in curves if figure.picture],
        compared=arms_figure(evidence),
        trades=trade_figures(evidence),
        disagreements=disagreements,
        explained=[(name, EXPLAINED[name]) for name in evidence.metric_names if name in EXPLAINED],
    )


def trade_figures(evidence: Evidence) -> list[Figure]:
    """Draw the primary metric of teacher and students against their size, and against their latency."""
    found = []
    for title, path, write in (
        ("parameters", ("parameters",), format_count),
        ("latency p50, ms", ("latency_ms", "p50"), format_number),
    ):
        costs = {each: evidence.efficiency(each, *path) for each in ("teacher", "student")}
        dots = [
            charts.Dot(bar.name, cost, bar.value, bar.style, bar.name in ("teacher", "distilled"))
            for bar in score_bars(evidence, [name for name in evidence.arms if name not in NO_MODEL])
            if (cost := costs["teacher" if bar.name == "teacher" else "student"]) is not None
        ]
        hollow = "Hollow: arms of the student's size that are not released."
        found.append(trade_figure(evidence.primary, title, dots, write, hollow, higher=evidence.direction > 0))
    return [figure for figure in found if figure.picture]


def trade_figure(
    metric: str, cost: str, dots: Sequence[charts.Dot], write: Callable[[float], str], marks: str, *, higher: bool
) -> Figure:
    """Draw a metric against what less of is better; `marks` says which dots are solid or hollow."""
    title = f"{metric} against {cost}"
    caption = f"Better is {'up' if higher else 'down'} and to the left. {marks}"
    write_y = partial(format_metric, metric)
    picture = charts.scatter_chart(dots, cost, title=title, description=caption, write_x=write, write_y=write_y)
    return Figure(title, picture, caption)


def fit_figure(evidence: Evidence) -> Figure:
    """Draw the loss of the teacher's own training."""
    line = charts.Series("loss", points(list(evidence.fit), "train", "loss"), "teacher")
    return line_figure("Fit of the teacher", "The teacher's loss on the labels while it was fitted", [line])


def score_tile(evidence: Evidence) -> Tile | None:
    """Show the student on the primary metric; None when it was not measured."""
    metric, student, teacher = evidence.primary, evidence.score("distilled"), evidence.score("teacher")
    if student is None:
        return None
    if teacher is None:
        return Tile(metric, format_metric(metric, student), "the teacher was not measured")
    retained = evidence.retained("distilled", metric)
    share = "" if retained is None else f", {format_percent(retained)} of its lead over the majority kept"
    note = f"teacher {format_metric(metric, teacher)}{share}"
    picture = charts.pair(teacher, student) if evidence.direction > 0 else None  # a shorter bar would look worse
    return Tile(metric, format_metric(metric, student), note, picture)


def size_tile(evidence: Evidence) -> Tile:
    """Show parameters, or layers when nothing was counted."""
    student, teacher = evidence.efficiency("student", "parameters"), evidence.efficiency("teacher", "parameters")
    if student is None or not teacher:
        deep, kept = evidence.plan.teacher_layers, len(evidence.plan.layers)
        return Tile("layers", str(kept), f"teacher {deep}", charts.pair(deep, kept))
    weights = evidence.efficiency("student", "bytes")
    note = f"teacher {format_count(teacher)}, {format_percent(student / teacher)} left"
    note += f", {format_megabytes(weights)}" if weights else ""
    return Tile("parameters", format_count(student), note, charts.pair(teacher, student))


def speed_tile(evidence: Evidence) -> Tile | None:
    """Show throughput against the teacher; None when it was not measured."""
    ratio = evidence.ratio("throughput")
    if ratio is None:
        return None
    student, teacher = evidence.efficiency("student", "throughput"), evidence.efficiency("teacher", "throughput")
    middle, _, span = format_ratio(ratio).partition(" ")
    note = f"{format_number(student)} against {format_number(teacher)} examples/s"
    note += f", range {span.strip('()')}" if span else ""
    return Tile("throughput", middle, note, charts.pair(teacher, student) if teacher and student else None)


def agreement_tile(evidence: Evidence) -> Tile | None:
    """Show how often the student says what the teacher says; None when it was not measured."""
    value, before = evidence.score("distilled", "agreement"), evidence.score("cut", "agreement")
    if value is None:
        return None
    note = "same answer as the teacher" + ("" if before is None else f"; {format_percent(before)} before training")
    return Tile("agreement", format_percent(value), note, charts.pair(1.0, value))


def cut_figure(evidence: Evidence) -> Figure:
    """Draw the teacher's layers, and those that live on in the student."""
    plan = evidence.plan
    if plan.given is not None:
        return Figure("Where the student comes from", Markup(""), describe_origin(evidence))
    sources = ", ".join(str(index) for index in plan.kept_layers)
    title = f"{len(plan.layers)} of {plan.teacher_layers} layers kept"
    description = (
        f"The student is made of teacher layers {sources}, with MLP widths {', '.join(map(str, plan.widths))}."
    )
    caption = (
        "Bar length: MLP width. Solid: neurons that live on in the student; pale: neurons pruned; dashed: layers "
        f"dropped. Layer policy {plan.layer_policy}, neuron score {plan.mlp_score}, allocation {plan.mlp_allocation}."
    )
    picture = charts.architecture(plan.teacher_layers, plan.layers, title=title, description=description)
    return Figure("What was cut", picture, caption)


def loss_figure(evidence: Evidence) -> Figure:
    """Draw the distilled student's training loss and each of its terms."""
    records = evidence.records.get("distilled", [])
    terms = dict.fromkeys(term for record in records for term in record.get("terms") or {})
    lines = [charts.Series("loss", points(records, "train", "loss"), "total")]
    for index, term in enumerate(terms):
        lines.append(charts.Series(term, points(records, "train", "terms", term), f"c{index % 6}"))
    return line_figure("Training loss", "Training loss and its terms", lines)


def held_out_figure(evidence: Evidence) -> Figure:
    """Draw the primary metric on the held-out split while the trained arms learned."""
    metric = evidence.primary
    lines = [
        charts.Series(arm, points(records, "evaluate", "metrics", metric), style_of(evidence, arm))
        for arm, records in evidence.records.items()
    ]
    levels = score_bars(evidence, [name for name, arm in evidence.arms.items() if not arm.get("steps")])
    caption = f"{metric} on the held-out split; arms that were not trained are horizontal lines"
    write = round_percent if is_percentage(metric) else format_number
    return line_figure(f"Held-out {metric}", caption, lines, levels=levels, write=write)


def rate_figure(evidence: Evidence) -> Figure:
    """Draw the learning rate as it was run."""
    line = charts.Series("lr", points(evidence.records.get("distilled", []), "train", "lr"), "total")
    training = evidence.recipe.training
    caption = f"Learning rate: {training.schedule}, peak {format_number(training.lr)}"
    return line_figure("Learning rate", caption, [line], may_be_log=False)


def line_figure(
    title: str,
    caption: str,
    lines: Sequence[charts.Series],
    *,
    levels: Sequence[charts.Bar] = (),
    write: Callable[[float], str] = format_number,
    may_be_log: bool = True,
) -> Figure:
    """Draw a line chart, on a logarithmic scale where values are far apart, which the caption then says."""
    values = [value for line in lines for _, value in line.points] + [level.value for level in levels]
    positive = [value for value in values if value > 0]
    log = may_be_log and bool(positive) and max(positive) > WIDE * min(positive)
    if log:
        caption += ", logarithmic scale" + (", without values of 0 or less" if len(positive) < len(values) else "")
    caption += "."
    picture = charts.line_chart(lines, title=title, description=caption, levels=levels, log=log, write=write)
    return Figure(title, picture, caption)


def round_percent(value: float) -> str:
    """Write a percentage of an axis, which is round."""
    return f"{100 * value:g} %"


def arms_figure(evidence: Evidence) -> Figure:
    """Draw the primary metric of every arm, side by side."""
    metric, bars = evidence.primary, score_bars(evidence, evidence.arms)
    teacher = next((bar for bar in bars if bar.name == "teacher"), None)
    better = "higher is better" if evidence.direction > 0 else "lower is better, further left"
    title, caption = f"Arms compared: {metric}", f"{metric}, {better}.{' Dashed: the teacher.' if teacher else ''}"
    write = partial(format_metric, metric)
    dots = evidence.direction < 0  # a long bar would look like much of something good
    picture = charts.bar_chart(bars, title=title, description=caption, mark=teacher, write=write, dots=dots)
    return Figure(title, picture, caption)


def score_bars(evidence: Evidence, names: Iterable[str]) -> list[charts.Bar]:
    """Collect the primary metric of those arms that have it."""
    values = [(name, evidence.score(name)) for name in names]
    return [charts.Bar(name, value, style_of(evidence, name)) for name, value in values if value is not None]


def style_of(evidence: Evidence, arm: str) -> str:
    """Choose the class of the stylesheet that colours an arm."""
    others = [name for name in evidence.arms if name not in ("teacher", "distilled")]
    return COLOURS[others.index(arm) % len(COLOURS)] if arm in others else arm


def points(records: list[dict[str, Any]], event: str, *path: str) -> list[charts.Point]:
    """Collect (step, value) in order of steps. A resumed run repeats steps: the last record of a step counts."""
    values = {record.get("step"): get_in(record, *path) for record in records if record.get("event") == event}
    pairs = ((as_number(step), as_number(value)) for step, value in values.items())
    return sorted((step, value) for step, value in pairs if step is not None and value is not None)

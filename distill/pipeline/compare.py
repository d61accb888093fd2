"""Compare runs: quality against size and speed, the runs that no other beats, and what their recipes differ in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.files import read_written
from distill.pipeline.json_shapes import Evaluation
from distill.recipe.load import read_released
from distill.release import charts
from distill.release.card import make_environment
from distill.release.figures import Figures, get_in
from distill.release.report import Figure, trade_figure
from distill.release.table import Table
from distill.release.wording import (
    MISSING,
    format_count,
    format_metric,
    format_number,
    format_percent,
    one_line,
)
from distill.training.provenance import flatten

COSTS: dict[str, tuple[tuple[str, ...], Callable[[Any], str]]] = {
    "parameters": (("parameters",), format_count),
    "FLOPs per example": (("flops_per_example",), lambda value: format_count(value, "kMGT")),
    "latency p50, ms": (("latency_ms", "p50"), format_number),
}
"""What less of is better -> where a measured model has it, and how it is written."""
SHOWN = 40
"""Letters of a recipe's value that a table shows."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    name: str
    figures: Figures
    settings: Mapping[str, Any]
    """Dotted key of the recipe -> value."""

    @property
    def score(self) -> float | None:
        """The distilled student on the metric that the arms are judged by."""
        return self.figures.score("distilled")

    def cost(self, title: str, model: str = "student") -> float | None:
        """Size or speed of a measured model, by a title of `COSTS`."""
        return self.figures.efficiency(model, *COSTS[title][0])

    @property
    def measured(self) -> tuple[Any, ...]:
        """All that must be equal for two scores to be compared."""
        return (self.figures.primary, self.figures.measured_on, self.figures.evaluation["data"]["examples"])


def read_run(folder: Path, name: str) -> Run:
    """Read a run folder or a release. Raises InputError where it holds no finished run."""
    path = folder / "evaluation.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no evaluation.json: no run that reached its evaluation, and no release")
    figures = Figures(read_written(path, Evaluation, "run its recipe again"))
    if "distilled" not in figures.arms:
        raise InputError(f"{path}: the distilled student was not measured; add it to evaluation.arms")
    settings = read_released(folder / "recipe.yaml").model_dump(mode="json", exclude={"name"})
    return Run(name, figures, flatten(settings))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs, named by their folders, and by folders above where these have one name; a release is its run.

    Raises:
        InputError: One is no finished run, one is named twice, or they were not measured by the same metric.
    """
    whole = [folder.resolve() for folder in folders]
    named = [folder.parent if folder.name == "release" else folder for folder in whole]
    if twice := [folder for folder in named if named.count(folder) > 1]:
        raise InputError(f"{twice[0]} is named twice")
    depth, names = 1, [folder.name for folder in named]
    while len({*names}) < len(names):
        depth += 1
        names = ["/".join(folder.parts[-depth:]) for folder in named]
    runs = [read_run(folder, name) for folder, name in zip(whole, names, strict=True)]
    if len({run.figures.primary for run in runs}) > 1:
        listed = ", ".join(f"{run.name} by {run.figures.primary}" for run in runs)
        raise InputError(f"these runs are judged by different metrics: {listed}; give runs of one task")
    return runs


def on_front(run: Run, runs: Sequence[Run], cost: str) -> bool:
    """Tell whether no other run is at least as good and as cheap, and better in one of the two (Pareto front)."""

    def place(each: Run) -> tuple[float, float] | None:
        score, price = each.score, each.cost(cost)
        return None if score is None or price is None else (score * each.figures.direction, -price)

    own = place(run)
    others = [other for each in runs if each is not run and (other := place(each)) is not None]
    return own is not None and not any(
        other != own and all(theirs >= mine for theirs, mine in zip(other, own, strict=True)) for other in others
    )


def runs_table(runs: Sequence[Run]) -> Table:
    """Tabulate quality, size and speed, and by which costs a run is on the front; first the teacher of the first."""
    metric, arrow = runs[0].figures.primary, "↑" if runs[0].figures.direction > 0 else "↓"

    def line(name: str, run: Run, arm: str, model: str, fronts: Sequence[str]) -> tuple[str, ...]:
        share = format_percent(run.figures.retained(arm, metric))
        costs = [write(run.cost(title, model)) for title, (_, write) in COSTS.items()]
        return (name, format_metric(metric, run.figures.score(arm)), share, *costs, ", ".join(fronts) or MISSING)

    rows = [line("teacher", runs[0], "teacher", "teacher", ())]
    rows += [line(run.name, run, "distilled", "student", [c for c in COSTS if on_front(run, runs, c)]) for run in runs]
    return Table(("run", f"{metric} {arrow}", "of the teacher's lead", *COSTS, "on the front of"), rows)


def settings_table(runs: Sequence[Run]) -> Table:
    """Tabulate the keys of the recipes that differ."""
    all_settings = [run.settings for run in runs]
    keys = dict.fromkeys(key for settings in all_settings for key in settings)
    rows = []
    for key in keys:
        values = [one_line(settings.get(key, MISSING)) for settings in all_settings]
        if len({*values}) > 1:
            rows.append((key, *(value if len(value) <= SHOWN else f"{value[: SHOWN - 1]}…" for value in values)))
    return Table(("key", *(run.name for run in runs)), rows, text_columns=1 + len(runs))


def warnings_about(runs: Sequence[Run]) -> list[str]:
    """Say what keeps the figures of these runs from being compared."""
    found = []
    if len({run.measured for run in runs}) > 1:
        sets = "; ".join(f"{run.name}: {run.measured[2]} of {run.measured[1]}" for run in runs)
        found.append(f"The runs were measured on different examples ({sets}): their scores cannot be compared.")
    elif len({run.figures.evaluation["data"]["fingerprint"] for run in runs}) > 1:
        found.append("The runs' data differ, in training or test rows: a difference in score may come from these.")
    if len({run.figures.score("teacher") for run in runs}) > 1:
        found.append(f"The runs have different teachers; the row of the teacher is that of {runs[0].name}.")
    measured = {run.name: get_in(run.figures.evaluation, "efficiency", "protocol", "device") for run in runs}
    if without := [name for name, device in measured.items() if device is None]:
        found.append(f"Size and speed were not measured in {', '.join(without)} (evaluation.efficiency).")
    read = {run.name: describe_read(run) for run in runs}
    if len({own for own in read.values() if own}) > 1:
        listed = "; ".join(f"{name}: {own}" for name, own in read.items() if own)
        found.append(f"FLOPs and latency are those of other inputs ({listed}): compare the parameters.")
    machines = sorted({str(device) for device in measured.values() if device is not None})
    if len(machines) > 1:
        found.append(f"Latency was measured on different machines ({', '.join(machines)}): compare the other columns.")
    elif machines:
        found.append("Latency was measured in each run by itself, not in turns: a few percent mean nothing.")
    return found


def describe_read(run: Run) -> str:
    """Say what an example is in a run's FLOPs and times, and in which dtype the student was; empty: not measured."""
    measured = get_in(run.figures.evaluation, "efficiency", "protocol") or {}
    sizes = [
        f"{key.replace('_', ' ')} {measured[key]}" for key in ("length", "frames", "target_length") if key in measured
    ]
    dtype = get_in(run.figures.evaluation, "efficiency", "models", "student", "dtype")
    return ", ".join([*sizes, *([str(dtype)] if dtype else [])]) if measured else ""


def figures(runs: Sequence[Run]) -> list[Figure]:
    """Draw quality against each cost."""
    first, drawn = runs[0], []
    for cost, (_, write) in COSTS.items():
        places = [("teacher", first.cost(cost, "teacher"), first.figures.score("teacher"), "teacher", True)]
        places += [(run.name, run.cost(cost), run.score, "distilled", on_front(run, runs, cost)) for run in runs]
        dots = [
            charts.Dot(name, price, score, style, solid)
            for name, price, score, style, solid in places
            if price is not None and score is not None
        ]
        marks = "Solid: on the front, no other run is as good for less."
        drawn.append(trade_figure(first.figures.primary, cost, dots, write, marks, higher=first.figures.direction > 0))
    return [figure for figure in drawn if figure.picture]


def render_comparison(runs: Sequence[Run]) -> str:
    """Render one self-contained HTML page."""
    environment = make_environment()
    environment.filters["one_line"] = one_line
    return environment.get_template("compare.html.jinja").render(
        runs=runs,
        figures=figures(runs),
        results=runs_table(runs),
        settings=settings_table(runs),
        warnings=warnings_about(runs),
    )

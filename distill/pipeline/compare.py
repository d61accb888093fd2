"""Compare runs: quality against size and speed, the runs that no other beats, and what their recipes differ in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.files import read_written
from distill.pipeline.written import Evaluation
from distill.recipe.load import read_released
from distill.release import charts
from distill.release.card import make_environment
from distill.release.evidence import get_in
from distill.release.report import Figure, trade_figure
from distill.release.table import Table
from distill.release.wording import (
    MISSING,
    as_number,
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
    """A finished run, or the teacher of one."""

    name: str
    score: float | None
    costs: Mapping[str, float | None]
    of_teacher: float | None = None
    settings: Mapping[str, Any] | None = None
    """Dotted key of the recipe -> value; None for a teacher."""
    evaluation: Mapping[str, Any] | None = None

    @property
    def primary(self) -> str:
        """The metric that its arms are judged by."""
        return str(get_in(self.evaluation, "primary"))

    @property
    def higher_is_better(self) -> bool:
        """The direction of this metric."""
        return bool((get_in(self.evaluation, "higher_is_better") or {}).get(self.primary, True))

    @property
    def measured(self) -> tuple[Any, ...]:
        """All that must be equal for two scores to be compared."""
        return (self.primary, *(get_in(self.evaluation, "data", key) for key in ("measured_on", "examples")))


def read_run(folder: Path, name: str) -> Run:
    """Read a run folder or a release. Raises InputError where it holds no finished run."""
    path = folder / "evaluation.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no evaluation.json: no run that reached its evaluation, and no release")
    evaluation = read_written(path, Evaluation, "run its recipe again")
    student, primary = find_arm(evaluation, "distilled"), evaluation["primary"]
    if get_in(student, "metrics") is None:
        raise InputError(f"{path}: the distilled student was not measured; add it to evaluation.arms")
    return Run(
        name,
        as_number(get_in(student, "metrics", primary)),
        costs_of(evaluation, "student"),
        as_number(get_in(student, "retained", primary)),
        flatten(read_released(folder / "recipe.yaml").model_dump(mode="json", exclude={"name"})),
        evaluation,
    )


def find_arm(evaluation: Mapping[str, Any] | None, name: str) -> Any:
    """Find an arm of an evaluation; None where it was not measured."""
    return next((arm for arm in get_in(evaluation, "arms") or () if get_in(arm, "name") == name), None)


def costs_of(evaluation: Mapping[str, Any] | None, model: str) -> dict[str, float | None]:
    """Collect size and speed of a measured model."""
    measured = get_in(evaluation, "efficiency", "models", model)
    return {title: as_number(get_in(measured, *path)) for title, (path, _) in COSTS.items()}


def teacher_of(run: Run) -> Run:
    """Make the row of a run's teacher."""
    score = get_in(find_arm(run.evaluation, "teacher"), "metrics", run.primary)
    return Run("teacher", as_number(score), costs_of(run.evaluation, "teacher"))


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
    if len({run.primary for run in runs}) > 1:
        listed = ", ".join(f"{run.name} by {run.primary}" for run in runs)
        raise InputError(f"these runs are judged by different metrics: {listed}; give runs of one task")
    return runs


def on_front(run: Run, runs: Sequence[Run], cost: str, *, higher: bool) -> bool:
    """Tell whether no other run is at least as good and as cheap, and better in one of the two (Pareto front)."""

    def place(each: Run) -> tuple[float, float] | None:
        price = each.costs[cost]
        return None if each.score is None or price is None else (each.score if higher else -each.score, -price)

    own = place(run)
    others = [other for each in runs if each is not run and (other := place(each)) is not None]
    return own is not None and not any(
        other != own and all(theirs >= mine for theirs, mine in zip(other, own, strict=True)) for other in others
    )


def runs_table(runs: Sequence[Run]) -> Table:
    """Tabulate quality, size and speed, and by which costs a run is on the front."""
    metric, higher, rows = runs[0].primary, runs[0].higher_is_better, []
    for run in (teacher_of(runs[0]), *runs):
        fronts = [cost for cost in COSTS if run in runs and on_front(run, runs, cost, higher=higher)]
        costs = [write(run.costs[title]) for title, (_, write) in COSTS.items()]
        share = format_percent(run.of_teacher) if run.of_teacher is not None else MISSING
        rows.append((run.name, format_metric(metric, run.score), share, *costs, ", ".join(fronts) or MISSING))
    return Table(
        ("run", f"{metric} {'↑' if higher else '↓'}", "of the teacher's lead", *COSTS, "on the front of"), rows
    )


def settings_table(runs: Sequence[Run]) -> Table:
    """Tabulate the keys of the recipes that differ."""
    all_settings = [run.settings or {} for run in runs]
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
    elif len({get_in(run.evaluation, "data", "fingerprint") for run in runs}) > 1:
        found.append("The runs' data differ, in training or test rows: a difference in score may come from these.")
    if len({teacher_of(run).score for run in runs}) > 1:
        found.append(f"The runs have different teachers; the row of the teacher is that of {runs[0].name}.")
    measured = {run.name: get_in(run.evaluation, "efficiency", "protocol", "device") for run in runs}
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
    measured = get_in(run.evaluation, "efficiency", "protocol") or {}
    sizes = [
        f"{key.replace('_', ' ')} {measured[key]}" for key in ("length", "frames", "target_length") if key in measured
    ]
    dtype = get_in(run.evaluation, "efficiency", "models", "student", "dtype")
    return ", ".join([*sizes, *([str(dtype)] if dtype else [])]) if measured else ""


def figures(runs: Sequence[Run]) -> list[Figure]:
    """Draw quality against each cost."""
    metric, higher, drawn = runs[0].primary, runs[0].higher_is_better, []
    for cost, (_, write) in COSTS.items():
        dots = [
            charts.Dot(run.name, price, score, "teacher" if run.settings is None else "distilled", solid)
            for run in (teacher_of(runs[0]), *runs)
            if (score := run.score) is not None and (price := run.costs[cost]) is not None
            for solid in [run.settings is None or on_front(run, runs, cost, higher=higher)]
        ]
        marks = "Solid: on the front, no other run is as good for less."
        drawn.append(trade_figure(metric, cost, dots, write, marks, higher=higher))
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

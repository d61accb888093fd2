"""The command line: one verb per stage, `key.path=value` overrides, and exit codes that mean something.

0 done; 1 failed while running; 2 the input is wrong (one message, no traceback); 75 stopped by a signal, go on with the
same command. torch is imported only by verbs that need it.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill import __version__
from distill.errors import DistillError, InputError, Stopped

if TYPE_CHECKING:
    from distill.recipe.schema import Recipe
    from distill.release.report import Section

app = typer.Typer(
    name="distill",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One recipe takes a large transformer to a released, measured small one.",
)
console = Console(stderr=True, highlight=False)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="Path of a recipe.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Replace values, e.g. training.lr=1e-4.")
]
Out = Annotated[Path | None, typer.Option(help="Run folder (default: runs/NAME).", show_default=False)]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run modelling code that comes with the teacher. Read it first.")
]
Continue = Annotated[
    bool, typer.Option("--continue-from-changed", help="Continue from a checkpoint that was made from other inputs.")
]


@app.command()
def validate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe and say everything that is wrong with it; needs no torch and no network."""
    loaded = _load(recipe, overrides)
    console.print(f"{recipe}: fine ({loaded.name})")


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from distill.recipe.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


def _add_verb(name: str, text: str) -> None:
    @app.command(name, help=text)
    def verb(
        recipe: RecipePath,
        overrides: Overrides = None,
        out: Out = None,
        remote_code: RemoteCode = False,
        continue_changed: Continue = False,
    ) -> None:
        _run(name, recipe, overrides, out, remote_code, continue_changed)


for _name, _text in {
    "plan": "Fit the teacher where the recipe says so, calibrate, and decide what the student keeps.",
    "build": "Everything up to the student as cut.",
    "train": "Everything up to the distilled student; also the door for `accelerate launch scripts/train.py`.",
    "evaluate": "Everything up to the measured arms; prints the table.",
    "release": "Everything up to the release folder.",
    "run": "The whole recipe. Give the same command again after an interruption; finished stages are skipped.",
}.items():
    _add_verb(_name, _text)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, package:NAME/SUBFOLDER, or hub id ORG/NAME.")],
    calibration: Annotated[Path | None, typer.Option(help="Statistics of an earlier run's calibration.")] = None,
    data: Annotated[str | None, typer.Option(help="Gather statistics over a built-in corpus or a file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report, with pictures, to this file as well.")] = None,
    keep_layers: Annotated[int | None, typer.Option(min=1, help="Layers to keep (default: half).")] = None,
    keep_mlp: Annotated[
        str, typer.Option(help="Neurons of each MLP to keep: a number, or a share with a point.")
    ] = "0.5",
    examples: Annotated[int, typer.Option(min=1, help="Texts to read with --data.")] = 256,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens per text with --data.")] = 128,
) -> None:
    """Show what is in a model: norms, zeros, redundancy, and what each policy and score would remove."""
    if calibration is not None and data is not None:
        raise InputError("--calibration and --data: give one of them")
    if html is not None and not html.absolute().parent.is_dir():
        raise InputError(f"--html: there is no folder {html.absolute().parent}")
    _quiet_libraries()
    from distill.files import write_text
    from distill.pipeline.inspect import Question, gather_statistics, inspect_model, open_model, read_statistics
    from distill.release.report import render_inspection

    question = Question(keep_layers, _share_or_count(keep_mlp))
    opened, statistics = open_model(model), None
    if calibration is not None:
        statistics = read_statistics(calibration, opened)
    elif data is not None:
        statistics = gather_statistics(model, opened, data, examples, max_length)
    sections = inspect_model(opened, statistics, question)
    _print_sections(sections)
    if html is not None:
        lead = f"A {opened.config.model_type} of {opened.num_parameters():,} parameters, without or before any cut."
        write_text(html.absolute(), render_inspection(model, lead, sections))
        console.print(f"written: {html}", markup=False)


def _print_sections(sections: Sequence[Section]) -> None:
    output = Console(highlight=False, markup=False, width=max(100, console.width))
    for section in sections:
        table = Table(title=section.title)
        for index, name in enumerate(section.table.head):
            table.add_column(name, justify="left" if index < section.table.text_columns else "right")
        for row in section.table.rows:
            table.add_row(*map(Text, row))
        output.print(table)
        output.print(section.note, "")


def _share_or_count(text: str) -> int | float:
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        value = 0
    if not 0 < value <= (1 if "." in text else float("inf")):
        raise InputError(f"--keep-mlp: {text} is neither a number of neurons nor a share above 0 and up to 1.0")
    return value


def _version(show: bool) -> None:
    if show:
        typer.echo(f"distill {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print version.")
    ] = False,
) -> None:
    """One recipe takes a large transformer to a released, measured small one."""


def _load(path: Path, overrides: list[str] | None) -> Recipe:
    from distill.recipe.load import load_recipe

    return load_recipe(path, overrides or ())


def _run(
    verb: str, path: Path, overrides: list[str] | None, out: Path | None, remote_code: bool, continue_changed: bool
) -> None:
    recipe = _load(path, overrides)  # before torch: a wrong recipe is answered at once
    _quiet_libraries()
    from distill.pipeline import STORY, VERBS, RunDir, Session, check_stages, run_stages
    from distill.ranks import launched, process_state
    from distill.training.signals import die_with_parent, leaving_in_time

    if launched():
        die_with_parent()
    main_process = process_state().is_main_process
    folder = out if out is not None else Path("runs") / recipe.name

    def say(message: str) -> None:
        if main_process:
            console.print(message, markup=False, soft_wrap=True)

    base = path.absolute().parent
    if base.is_relative_to(folder.absolute()):
        raise InputError(f"--out {folder} holds the recipe itself, which the run would overwrite; name another folder")
    session = Session(recipe, base, RunDir(folder.absolute()), say, remote_code, continue_changed)
    with leaving_in_time():
        check_stages(session, STORY)
        run_stages(session, VERBS[verb])
    if main_process and verb in ("evaluate", "release", "run"):
        _print_table(json.loads(session.run.evaluation.read_text(encoding="utf-8")))
    if main_process and verb in ("release", "run"):
        say(f"released: {folder / 'release'}   report: {folder / 'report.html'}")


def _quiet_libraries() -> None:
    # Their progress bars and notices about heads that are about to be fitted would bury our own lines.
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def _print_table(evaluation: dict[str, Any]) -> None:
    metrics = evaluation["metrics"]
    table = Table(title=f"{evaluation['data']['examples']} held-out examples of {evaluation['data']['source']}")
    table.add_column("arm")
    for name in [*metrics, "retained", "steps"]:
        table.add_column(name, justify="right")
    for arm in evaluation["arms"]:
        retained = arm["retained"].get(evaluation["primary"])
        share = "" if retained is None else f"{100 * retained:.1f} %"
        values = [arm["metrics"][name] for name in metrics]
        cells = ["not finite" if value is None else f"{value:.4f}" for value in values]
        table.add_row(arm["name"], *cells, share, str(arm["steps"]))
    output = Console(highlight=False, width=max(100, console.width))  # off a terminal rich would cut columns at 80
    output.print(table)
    if evaluation["efficiency"]:
        output.print(_efficiency_table(evaluation["efficiency"]))


def _efficiency_table(efficiency: dict[str, Any]) -> Table:
    table = Table(title="size and speed, student against teacher, measured in one run")
    for name in ("", "teacher", "student", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    teacher, student = (efficiency["models"][name] for name in ("teacher", "student"))
    ratios = efficiency["ratios"]["student"]
    rows = [
        ("parameters", teacher["parameters"], student["parameters"], ratios["parameters"]),
        ("parameters in layers", teacher["layer_parameters"], student["layer_parameters"], ratios["layer_parameters"]),
        ("bytes on disk", teacher["disk_bytes"], student["disk_bytes"], ratios["disk_bytes"]),
        ("FLOPs per example", teacher["flops_per_example"], student["flops_per_example"], ratios["flops"]),
        ("latency ms, batch 1", teacher["latency_ms"]["p50"], student["latency_ms"]["p50"], ratios["latency"]),
        ("examples per second", teacher["throughput"], student["throughput"], ratios["throughput"]),
    ]
    for name, before, after, ratio in rows:
        median = ratio["median"] if isinstance(ratio, dict) else ratio
        table.add_row(name, f"{before:,.4g}" if isinstance(before, float) else f"{before:,}",
                      f"{after:,.4g}" if isinstance(after, float) else f"{after:,}", f"{median:.3f}")  # fmt: skip
    return table


def _stop(number: int, _frame: FrameType | None) -> None:
    # Outside training nothing is lost either: finished stages are kept, an unfinished one left nothing behind.
    raise Stopped(f"by {signal.Signals(number).name}; the same command continues from the last finished stage")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    previous = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        result = app(arguments, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.Exit as exit_:
        return exit_.exit_code
    except DistillError as error:
        console.print(f"{'stopped' if error.exit_code == 75 else 'error'}: {error}", markup=False, soft_wrap=True)
        return error.exit_code
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's usage errors
            console.print(f"error: {error.format_message() or 'a verb is missing; see distill --help'}", markup=False)
            return 2
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def entry() -> None:
    """The console script."""
    sys.exit(main())

"""The command line: one verb per stage, `key.path=value` overrides, and exit codes that mean something.

0 done; 1 failed while running; 2 the input is wrong (one message, no traceback); 75 stopped by a signal, go on with the
same command. torch is imported only by verbs that need it.
"""

from __future__ import annotations

import errno
import json
import logging
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import rich.table
import typer
from rich.console import Console
from rich.text import Text

from distill import __version__
from distill.errors import DistillError, InputError, RunError, Stopped
from distill.release.wording import one_line, printable

if TYPE_CHECKING:
    from distill.pipeline import Session
    from distill.release.table import Table

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
More = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE]... [KEY.PATH=VALUE]...",
        help="More recipes, one after the other; values to replace in all of them, e.g. training.lr=1e-4.",
    ),
]
Out = Annotated[Path | None, typer.Option(help="Run folder (default: runs/NAME).", show_default=False)]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run modelling code that comes with the teacher. Read it first.")
]
Continue = Annotated[
    bool, typer.Option("--continue-from-changed", help="Continue from a checkpoint that was made from other inputs.")
]

CheckOldest = Annotated[
    bool, typer.Option("--check-oldest", help="Load the release with the oldest supported transformers, too (by pip).")
]
AcceptWeak = Annotated[
    bool, typer.Option("--accept-weak-teacher", help="Go on with a teacher that is no better than chance on the data.")
]


@app.command()
def validate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe and say everything that is wrong with it; needs no torch and no network."""
    from distill.recipe.load import load_recipe
    from distill.recipe.locate import is_left_behind

    loaded = load_recipe(recipe, overrides or ())
    sources = [source.source for split in loaded.rows.splits for source in loaded.rows.origins(split)]
    names = (*(model.model for model in loaded.models.values()), *sources)
    absent = " and ".join(name for name in names if is_left_behind(name, recipe.absolute().parent))
    _say(f"{recipe}: fine ({loaded.name})")
    if absent:
        _say(f"  {absent}: not in this release, so not looked at")


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from distill.recipe.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


Memory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Only say what fits on a card with so much memory, e.g. 80GB; nothing is run."),
]


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Out = None,
    memory: Memory = None,
    remote_code: RemoteCode = False,
    continue_changed: Continue = False,
    accept_weak_teacher: AcceptWeak = False,
) -> None:
    """Fit the teacher where the recipe says so, calibrate, decide what the student keeps; say what training takes."""
    if memory is None:
        _run("plan", recipe, overrides, out, (remote_code, continue_changed, accept_weak_teacher, False))
    else:
        _plan_for(memory, recipe, overrides, remote_code)


def _add_verb(name: str, text: str) -> None:
    @app.command(name, help=text)
    def verb(
        recipe: RecipePath,
        overrides: More = None,
        out: Out = None,
        remote_code: RemoteCode = False,
        continue_changed: Continue = False,
        accept_weak_teacher: AcceptWeak = False,
    ) -> None:
        _run_each(name, recipe, overrides, out, (remote_code, continue_changed, accept_weak_teacher, False))


for _name, _text in {
    "build": "Everything up to the student as cut.",
    "cache": "Everything up to what the teacher says about the training examples, where `teacher.cache` asks for it.",
    "train": "Everything up to the distilled student; also the door for `accelerate launch scripts/train.py`.",
    "evaluate": "Everything up to the measured arms; prints the table.",
}.items():
    _add_verb(_name, _text)


def _add_release_verb(name: str, text: str) -> None:
    @app.command(name, help=text)
    def verb(
        recipe: RecipePath,
        overrides: More = None,
        out: Out = None,
        remote_code: RemoteCode = False,
        continue_changed: Continue = False,
        accept_weak_teacher: AcceptWeak = False,
        check_oldest: CheckOldest = False,
    ) -> None:
        _run_each(name, recipe, overrides, out, (remote_code, continue_changed, accept_weak_teacher, check_oldest))


for _name, _text in {
    "release": "Everything up to the release folder.",
    "run": "The whole recipe. Give the same command again after an interruption; finished stages are skipped.",
}.items():
    _add_release_verb(_name, _text)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, package:NAME/SUBFOLDER, or hub id ORG/NAME.")],
    calibration: Annotated[Path | None, typer.Option(help="Statistics of an earlier run's calibration.")] = None,
    data: Annotated[str | None, typer.Option(help="Gather statistics over a built-in corpus or a file.")] = None,
    keep_layers: Annotated[int | None, typer.Option(min=1, help="Layers to keep (default: half).")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Texts to read with --data.")] = 256,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens per text with --data.")] = 128,
) -> None:
    """Show what is in a model: norms, zeros, redundancy, and the layers that each policy would drop."""
    if calibration is not None and data is not None:
        raise InputError("--calibration and --data: give one of them")
    _quiet_libraries()
    from distill.pipeline.inspect import gather_statistics, inspect_model, open_model, read_statistics

    opened, statistics = open_model(model), None
    if calibration is not None:
        statistics = read_statistics(calibration, opened)
    elif data is not None:
        statistics = gather_statistics(model, opened, data, examples, max_length)
    for title, table, note in inspect_model(opened, statistics, keep_layers):
        _print_table(title, table)
        _wide_console().print(printable(note), "")


@app.command()
def verify(
    release: Annotated[Path, typer.Argument(metavar="FOLDER", help="A released folder.")],
    data: Annotated[Path | None, typer.Option(help="Folder with the data files that its recipe names.")] = None,
    teacher: Annotated[str | None, typer.Option(help="The teacher's folder, or package:NAME/SUBFOLDER.")] = None,
) -> None:
    """Measure a released folder again, and say of every figure whether it comes out as claimed."""
    _quiet_libraries()
    from distill.pipeline.verify import verify_release

    with tempfile.TemporaryDirectory() as scratch:
        found = verify_release(release, Path(scratch), data, teacher, _say)
    _print_table(str(release), found.table())
    if found.faults:
        raise RunError(f"{found.faults} of {len(found.checks)} claims do not hold")
    _say(f"{release}: every claim that was checked holds")


@app.command()
def push(
    release: Annotated[Path, typer.Argument(metavar="FOLDER", help="A released folder.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository on the model hub.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it; otherwise it is private.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Send a release to the model hub, with the token in HF_TOKEN, after showing every file."""
    _quiet_libraries()
    from distill.release.push import prepare_push
    from distill.release.push import push as send

    prepared = prepare_push(release, repository, public=public)
    for line in prepared.describe():
        _say(line)
    if not yes and not sys.stdin.isatty():
        raise InputError("nobody is here to be asked; look at the list, and add --yes")
    if not yes and not typer.confirm("Send these files?", err=True):
        raise InputError("nothing was sent")
    _say(f"sent: {send(prepared)}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Two or more run folders, or releases.")],
    out: Annotated[Path | None, typer.Option(help="Also write one HTML page to this file.")] = None,
) -> None:
    """Compare finished runs: quality against size and speed, and what their recipes differ in."""
    from distill.files import write_text
    from distill.pipeline.compare import read_runs, render_comparison, runs_table, settings_table, warnings_about

    if len(runs) < 2:
        raise InputError("one run alone has nothing to be compared with; name two or more")
    if out is not None and (out.is_dir() or out.suffix != ".html"):
        raise InputError(f"--out: {out} is no name of an HTML page, as comparison.html")
    found = read_runs(runs)
    _print_table(f"{len(found)} runs", runs_table(found))
    _print_table("what their recipes differ in", settings_table(found))
    for line in warnings_about(found):
        _say(line)
    if out is not None:
        write_text(out, render_comparison(found))
        _say(f"written: {out}")


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


def _run_each(
    verb: str, path: Path, overrides: list[str] | None, out: Path | None, flags: tuple[bool, bool, bool, bool]
) -> None:
    """Run a verb on a recipe, and on those among the overrides, one after the other."""
    more = [text for text in overrides or () if "=" not in text and text.endswith((".yaml", ".yml"))]
    values = [text for text in overrides or () if text not in more]
    recipes = [path, *map(Path, more)]
    if more or verb == "cache":
        _check_together(verb, recipes, values, out)
    for each in recipes:
        if more:
            _say(f"{each}:")
        _run(verb, each, values, out, flags)


def _check_together(verb: str, paths: list[Path], overrides: list[str], out: Path | None) -> None:
    """Look at all recipes of a command before the first one takes hours, and refuse two with one run folder."""
    from distill.recipe.load import load_recipe

    recipes = [load_recipe(path, overrides) for path in paths]
    for path, recipe in zip(paths, recipes, strict=True):
        if verb == "cache" and recipe.teacher.cache is None:
            raise InputError(f"{path} asks for no cache: add `cache: {{keep: hidden}}` under `teacher:`")
    names = [recipe.name for recipe in recipes]
    if len(paths) > 1 and out is not None:
        raise InputError("--out: several recipes need a run folder each, runs/NAME; leave it out")
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"several of these recipes are named {min(twice)}, and would have one run folder; rename them")


def _run(
    verb: str, path: Path, overrides: list[str] | None, out: Path | None, flags: tuple[bool, bool, bool, bool]
) -> None:
    from distill.recipe.load import load_recipe

    recipe = load_recipe(path, overrides or ())  # before torch: a wrong recipe is answered at once
    _quiet_libraries()
    from distill.pipeline import STORY, VERBS, RunDir, Session, local_inputs, run_stages
    from distill.ranks import launched, process_state
    from distill.release.oldest import oldest_installed
    from distill.training.signals import die_with_parent, leaving_in_time

    if launched():
        die_with_parent()
    main_process = process_state().is_main_process
    folder = out if out is not None else Path("runs") / recipe.name

    def say(message: str) -> None:
        if main_process:
            _say(message)

    base, run = path.absolute().parent, RunDir(folder.absolute())
    run.check({"the recipe": path, **local_inputs(recipe, base)})
    remote_code, continue_changed, accept_weak, check_oldest = flags
    with leaving_in_time(), oldest_installed(say) if check_oldest and main_process else nullcontext() as older:
        session = Session(recipe, base, run, say, remote_code, continue_changed, accept_weak, older)
        run_stages(session, VERBS[verb], STORY)
    if main_process and verb == "plan":
        _print_resources(session)
    if main_process and verb in ("evaluate", "release", "run"):
        _print_evaluation(session)
    if main_process and verb in ("release", "run"):
        say(f"released: {folder / 'release'}   report: {folder / 'report.html'}")


def _plan_for(memory: str, path: Path, overrides: list[str] | None, remote_code: bool) -> None:
    """Say what fits on a card that need not be there, from the recipe and the teacher's config."""
    from distill.recipe.load import load_without_weights

    recipe = load_without_weights(path, overrides or ())
    _quiet_libraries()
    from distill.models.memory import parse_size
    from distill.pipeline import RunDir, Session
    from distill.pipeline.resources import forecast_for

    size, base = parse_size(memory), path.absolute().parent
    session = Session(recipe, base, RunDir(Path("runs") / recipe.name), _say, remote_code)
    for title, table, note in forecast_for(session, size):
        _print_table(title, table)
        _wide_console().print(printable(note), "")


def _print_resources(session: Session) -> None:
    from distill.pipeline.resources import depth_before_width, forecast

    for title, table, note in forecast(session):
        _print_table(title, table)
        _wide_console().print(printable(note), "")
    if line := depth_before_width(session):
        _say(line)


def _quiet_libraries() -> None:
    # Their progress bars and notices about heads that are about to be fitted would bury our own lines.
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def _say(message: str) -> None:
    """Print a message, which may name classes, columns and files of strangers, on standard error."""
    console.print(printable(message), markup=False, soft_wrap=True)


def _wide_console() -> Console:
    return Console(highlight=False, markup=False, width=max(110, console.width))  # else rich cuts columns at 80


def _print_table(title: str, table: Table) -> None:
    printed = rich.table.Table(title=one_line(title))
    for index, name in enumerate(table.head):
        printed.add_column(one_line(name), justify="left" if index < table.text_columns else "right")
    for row in table.rows:
        printed.add_row(*(Text(one_line(cell)) for cell in row))
    _wide_console().print(printed)


def _print_evaluation(session: Session) -> None:
    from distill.pipeline.release import collect_evidence
    from distill.release.controls import seeds_table, seeds_title
    from distill.release.sizes import bytes_table, efficiency_table, speed_table
    from distill.release.tables import arms_table, harness_table

    evidence = collect_evidence(session)
    examples, efficiency = evidence.evaluation["data"]["examples"], efficiency_table(evidence)
    titles = {f"{examples} held-out examples of {evidence.measured_on}": evidence}
    titles |= {f"{name} ({own.trained_on or 'not trained on'})": own for name, own in evidence.elsewhere.items()}
    for title, own in titles.items():
        arms = arms_table(own)
        rows = [(name, *row[1:]) for name, row in zip(own.arms, arms.rows, strict=True)]  # titles are too wide
        _print_table(title, replace(arms, rows=rows))
        if title := seeds_title(own):
            _print_table(title, seeds_table(own, short=True))
    if (harness := harness_table(evidence)).rows:
        _print_table("lm-evaluation-harness, with one standard error", harness)
    if efficiency.rows:
        _print_table("size and speed, measured in one run", efficiency)
        _print_table("memory and throughput", speed_table(evidence))
        _print_table("where the bytes are", bytes_table(evidence))


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
        _say(f"{'stopped' if error.exit_code == 75 else 'error'}: {error}")
        return error.exit_code
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's usage errors
            _say(f"error: {error.format_message() or 'a verb is missing; see distill --help'}")
            return 2
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            _say(f"error: the disk is full: {error}; make space, and give the same command again")
            return 1
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _tame_output() -> None:
    """Let nothing steer the terminal of what Python and libraries print: tracebacks, warnings and log records."""
    make, write = logging.getLogRecordFactory(), warnings.formatwarning

    def plain_record(*given: Any, **named: Any) -> logging.LogRecord:
        record = make(*given, **named)
        record.msg, record.args = printable(record.getMessage()), ()
        return record

    sys.excepthook = lambda *error: _say("".join(traceback.format_exception(*error)).rstrip())
    threading.excepthook = lambda found: _say("".join(traceback.format_exception(*found[:3])).rstrip())
    warnings.formatwarning = lambda *given, **named: printable(write(*given, **named))
    logging.setLogRecordFactory(plain_record)


def entry(arguments: list[str] | None = None) -> None:
    """Exit with what the command line returns (console script)."""
    _tame_output()
    sys.exit(main(arguments))

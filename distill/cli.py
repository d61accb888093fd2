"""The command line: one verb per stage, `key.path=value` overrides, and exit codes that mean something.

0 done; 1 failed while running; 2 the input is wrong (one message, no traceback); 75 stopped by a signal, go on with the
same command. torch is imported only by verbs that need it.
"""

from __future__ import annotations

import errno
import json
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Annotated, NamedTuple

import typer

from distill import __version__
from distill.errors import DistillError, InputError, Stopped
from distill.terminal import (
    print_evaluation,
    print_tables,
    quiet_libraries,
    say,
    tame_output,
)
from distill.verbs import compare, inspect, push, verify

app = typer.Typer(
    name="distill",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One recipe takes a large transformer to a released, measured small one.",
)
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
    bool,
    typer.Option(
        "--check-oldest", help="release, run: load the release with the oldest supported transformers, too (by pip)."
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Only say what fits on a card with so much memory, e.g. 80GB; nothing is run."),
]
AcceptWeak = Annotated[
    bool, typer.Option("--accept-weak-teacher", help="Go on with a teacher that is no better than chance on the data.")
]
RELEASING = ("release", "run")
"""Verbs that write a release."""


@app.command()
def validate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe and say everything that is wrong with it; needs no torch and no network."""
    from distill.recipe.load import load_recipe
    from distill.recipe.locate import is_left_behind

    loaded = load_recipe(recipe, overrides or ())
    sources = [source.source for split in loaded.rows.splits for source in loaded.rows.origins(split)]
    names = (*(model.model for model in loaded.models.values()), *sources)
    absent = " and ".join(name for name in names if is_left_behind(name, recipe.absolute().parent))
    say(f"{recipe}: fine ({loaded.name})")
    if absent:
        say(f"  {absent}: not in this release, so not looked at")


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from distill.recipe.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


class Flags(NamedTuple):
    """Permissions and checks that only the command line gives."""

    remote_code: bool
    continue_changed: bool
    accept_weak_teacher: bool
    check_oldest: bool = False


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
        _run("plan", recipe, overrides, out, Flags(remote_code, continue_changed, accept_weak_teacher))
        return
    given = {"--out": out, "--continue-from-changed": continue_changed, "--accept-weak-teacher": accept_weak_teacher}
    if useless := [name for name, value in given.items() if value]:
        raise InputError(f"{useless[0]}: with --memory nothing is run, so it would do nothing; leave it out")
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
        check_oldest: CheckOldest = False,
    ) -> None:
        if check_oldest and name not in RELEASING:
            raise InputError(f"--check-oldest: {name} writes no release; give it to {' or '.join(RELEASING)}")
        flags = Flags(remote_code, continue_changed, accept_weak_teacher, check_oldest)
        _run_each(name, recipe, overrides, out, flags)


for _name, _text in {
    "build": "Everything up to the student as cut.",
    "cache": "Everything up to what the teacher says about the training examples, where `teacher.cache` asks for it.",
    "train": "Everything up to the distilled student; also the door for `accelerate launch scripts/train.py`.",
    "evaluate": "Everything up to the measured arms; prints the table.",
    "release": "Everything up to the release folder.",
    "run": "The whole recipe. Give the same command again after an interruption; finished stages are skipped.",
}.items():
    _add_verb(_name, _text)


for _verb in (inspect, verify, compare, push):
    app.command()(_verb)


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


def _run_each(verb: str, path: Path, overrides: list[str] | None, out: Path | None, flags: Flags) -> None:
    """Run a verb on a recipe, and on those among the overrides, one after the other."""
    more = [text for text in overrides or () if "=" not in text and text.endswith((".yaml", ".yml"))]
    values = [text for text in overrides or () if text not in more]
    recipes = [path, *map(Path, more)]
    if more or verb == "cache":
        _check_together(verb, recipes, values, out)
    for each in recipes:
        if more:
            say(f"{each}:")
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


def _run(verb: str, path: Path, overrides: list[str] | None, out: Path | None, flags: Flags) -> None:
    from distill.recipe.load import load_recipe

    recipe = load_recipe(path, overrides or ())  # before torch: a wrong recipe is answered at once
    quiet_libraries()
    from distill.pipeline import STORY, VERBS, RunDir, Session, local_inputs, run_stages
    from distill.ranks import launched, process_state
    from distill.release.oldest_transformers import oldest_installed
    from distill.training.signals import die_with_parent, leaving_in_time

    if launched():
        die_with_parent()
    main_process = process_state().is_main_process
    folder = out if out is not None else Path("runs") / recipe.name

    def say_once(message: str) -> None:
        if main_process:
            say(message)

    base, run = path.absolute().parent, RunDir(folder.absolute())
    run.check({"the recipe": path, **local_inputs(recipe, base)})
    remote_code, continue_changed, accept_weak, check_oldest = flags
    with leaving_in_time(), oldest_installed(say_once) if check_oldest and main_process else nullcontext() as older:
        session = Session(recipe, base, run, say_once, remote_code, continue_changed, accept_weak, older)
        run_stages(session, VERBS[verb], STORY)
    if not main_process:
        return
    if verb == "plan":
        from distill.pipeline.resources import depth_before_width, forecast

        print_tables(forecast(session))
        if line := depth_before_width(session):
            say(line)
    if verb in ("evaluate", *RELEASING):
        print_evaluation(session)
    if verb in RELEASING:
        say(f"released: {folder / 'release'}   report: {folder / 'report.html'}")


def _plan_for(memory: str, path: Path, overrides: list[str] | None, remote_code: bool) -> None:
    """Say what fits on a card that need not be there, from the recipe and the teacher's config."""
    from distill.recipe.load import load_without_weights

    recipe = load_without_weights(path, overrides or ())
    quiet_libraries()
    from distill.models.memory import parse_size
    from distill.pipeline import RunDir, Session
    from distill.pipeline.resources import forecast_for

    size, base = parse_size(memory), path.absolute().parent
    session = Session(recipe, base, RunDir(Path("runs") / recipe.name), say, remote_code)
    print_tables(forecast_for(session, size))


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
        say(f"{'stopped' if error.exit_code == 75 else 'error'}: {error}")
        return error.exit_code
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's usage errors
            say(f"error: {error.format_message() or 'a verb is missing; see distill --help'}")
            return 2
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            say(f"error: the disk is full: {error}; make space, and give the same command again")
            return 1
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def entry(arguments: list[str] | None = None) -> None:
    """Exit with what the command line returns (console script)."""
    tame_output()
    sys.exit(main(arguments))

"""The verbs about models, runs and releases that are there already; torch is imported when one is called."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from distill.errors import InputError, RunError
from distill.terminal import print_table, print_tables, quiet_libraries, say


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, package:NAME/SUBFOLDER, or hub id ORG/NAME.")],
    calibration: Annotated[Path | None, typer.Option(help="Statistics of an earlier run's calibration.")] = None,
    data: Annotated[str | None, typer.Option(help="Gather statistics over a built-in corpus or a file.")] = None,
    keep_layers: Annotated[int | None, typer.Option(min=1, help="Layers to keep (default: half).")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Texts to read with --data (default: 256).")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens per text with --data (default: 128).")] = None,
) -> None:
    """Show what is in a model: norms, zeros, redundancy, and the layers that each policy would drop."""
    if calibration is not None and data is not None:
        raise InputError("--calibration and --data: give one of them")
    if data is None and (examples, max_length) != (None, None):
        raise InputError("--examples and --max-length say what is read with --data; give it, or leave them out")
    quiet_libraries()
    from distill.pipeline.inspect import gather_statistics, inspect_model, open_model, read_statistics

    opened, statistics = open_model(model), None
    if calibration is not None:
        statistics = read_statistics(calibration, opened)
    elif data is not None:
        statistics = gather_statistics(model, opened, data, examples or 256, max_length or 128)
    print_tables(inspect_model(opened, statistics, keep_layers))


def verify(
    release: Annotated[Path, typer.Argument(metavar="FOLDER", help="A released folder.")],
    data: Annotated[Path | None, typer.Option(help="Folder with the data files that its recipe names.")] = None,
    teacher: Annotated[str | None, typer.Option(help="The teacher's folder, or package:NAME/SUBFOLDER.")] = None,
    run_functions: Annotated[
        bool,
        typer.Option("--run-functions", help="Call the functions that its recipe names (package.module:function)."),
    ] = False,
) -> None:
    """Measure a released folder again, and say of every figure whether it comes out as claimed."""
    quiet_libraries()
    from distill.pipeline.verify import verify_release

    with tempfile.TemporaryDirectory() as scratch:
        found = verify_release(release, Path(scratch), data, teacher, say, run_functions=run_functions)
    print_table(str(release), found.table())
    if found.faults:
        raise RunError(f"{found.faults} of {len(found.checks)} claims do not hold")
    others = "; figures that are not the same are of another machine, or of other weights" if found.within else ""
    say(f"{release}: every claim that was checked holds{others}")


def push(
    release: Annotated[Path, typer.Argument(metavar="FOLDER", help="A released folder.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository on the model hub.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it; otherwise it is private.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Send a release to the model hub, with the token in HF_TOKEN, after showing every file."""
    quiet_libraries()
    from distill.release.push import prepare_push
    from distill.release.push import push as send

    prepared = prepare_push(release, repository, public=public)
    for line in prepared.describe():
        say(line)
    if not yes and not sys.stdin.isatty():
        raise InputError("nobody is here to be asked; look at the list, and add --yes")
    try:
        agreed = yes or typer.confirm("Send these files?", err=True)
    except typer.Abort:  # the end of the input is no answer
        agreed = False
    if not agreed:
        raise InputError("nothing was sent")
    say(f"sent: {send(prepared)}")


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
    print_table(f"{len(found)} runs", runs_table(found))
    print_table("what their recipes differ in", settings_table(found))
    for line in warnings_about(found):
        say(line)
    if out is not None:
        write_text(out, render_comparison(found))
        say(f"written: {out}")

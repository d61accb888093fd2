"""A stage: its inputs, work, results and checks; and the rule by which it is skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list

from distill import __version__
from distill.errors import InputError, Stopped
from distill.files import content_of, read_written, write_json, write_text
from distill.pipeline.json_shapes import Stamp
from distill.pipeline.session import Session
from distill.ranks import check_launch, process_state
from distill.recipe.datafiles import searched_paths
from distill.recipe.load import dump, fingerprint
from distill.recipe.locate import is_path, teacher_folder
from distill.recipe.schema import Optimization, Recipe
from distill.training.provenance import describe_changes, flatten
from distill.training.signals import StopSignals
from distill.training.tracking import forget_peak, measure_memory

if TYPE_CHECKING:
    from accelerate import PartialState

PATIENCE = timedelta(days=30)
"""Timeout of ranks that wait for the main one. The launcher ends them when it dies."""

WHEN_NOT_WHAT = {"save_every", "log_every", "evaluate_every", "keep_best", "trackers"}
HOW_NOT_WHAT = {"micro_batch_size", "loader_workers", "gradient_checkpointing", "compile"}
"""Keys of when to look, and of how to compute the same up to rounding: changing them neither reruns a stage nor voids a
checkpoint."""


def with_version(inputs: dict[str, Any]) -> dict[str, Any]:
    """Flatten what a result is made from to dotted keys, this version of distill included."""
    return flatten({**inputs, "distill": __version__})


def settings_of(spec: Optimization) -> dict[str, Any]:
    """Select the keys of a training that decide what it computes."""
    return spec.model_dump(mode="json", exclude=WHEN_NOT_WHAT | HOW_NOT_WHAT)


@dataclass(frozen=True)
class Stage:
    """One step of the story."""

    name: str
    work: Callable[[Session], None]
    inputs: Callable[[Session], dict[str, Any]]
    """Everything that the results depend on, as JSON."""
    results: Callable[[Session], Sequence[Path]]
    """Files and folders that the work leaves behind."""
    wanted: Callable[[Recipe], bool] = lambda _recipe: True
    """False where the recipe does not ask for the stage."""
    together: bool = False
    """Every rank takes part; other stages are done by the main one while the rest wait."""
    lost: Callable[[Session], str] = lambda _session: ""
    """Names what is gone of results that lie outside of the run folder; empty: nothing."""
    check: Callable[[Session], None] = lambda _session: None
    """Raises InputError before anything is done, when the recipe asks for something that this stage cannot do. Not
    called where the stage is not wanted."""
    check_data: Callable[[Session], None] = lambda _session: None
    """The same for what the data must have; runs once the first stage has prepared them."""


def run_stages(session: Session, stages: Sequence[Stage], story: Sequence[Stage] = ()) -> None:
    """Check the whole story, then run each stage that the recipe asks for and whose inputs or results changed.

    Args:
        session: The recipe at work.
        stages: The stages to bring up to date; the first prepares the data.
        story: Stages that are checked, also where a later command runs them; empty: `stages`.

    Raises:
        InputError: The recipe or the data lack what a stage needs, or the run folder is in use.
    """
    checked = [stage for stage in story or stages if stage.wanted(session.recipe)]
    for each in checked:
        each.check(session)
    state = process_state()
    check_launch(state.num_processes, state.device.type)
    wait = _patient_wait(state)
    with session.folder.locked() if state.is_main_process else nullcontext():
        if state.is_main_process:
            write_text(session.folder.recipe, dump(with_absolute_paths(session.recipe, session.base)))
        for number, stage in enumerate(stages):
            _run_stage(session, stage, wait)
            for each in checked if number == 0 else ():
                each.check_data(session)


def run_inside(session: Session, stages: Sequence[Stage]) -> None:
    """Bring stages of a child run up to date within a stage of its parent, which holds the lock. Collective."""
    wait = _patient_wait(process_state())
    for stage in stages:
        _run_stage(session, stage, wait)


def _run_stage(session: Session, stage: Stage, wait: Callable[[], Any]) -> None:
    """Bring one stage up to date: its inputs, the reason to run it, its work, and the stamp of its results."""
    if not stage.wanted(session.recipe):
        return
    if StopSignals.pending:
        raise Stopped("by a signal; the same command continues from the last finished stage")
    main, stamp = process_state().is_main_process, session.folder.stamp(stage.name)
    inputs = with_version(stage.inputs(session)) if main else {}
    reason = _reason_to_run(session, stage, inputs) if main else None
    wait()  # to read large folders takes long as well
    (reason,) = broadcast_object_list([reason])
    if reason is None:
        session.say(f"{stage.name}: unchanged, skipped")
        return
    if reason:
        session.say(f"{stage.name}: runs again ({reason})")
    start = time.monotonic()
    forget_peak()
    session.say(f"{stage.name}: started")
    if main:
        stamp.unlink(missing_ok=True)
    if stage.together or main:
        stage.work(session)
    wait()
    if main:
        seconds = round(time.monotonic() - start, 1)
        made = {"made_from": fingerprint(inputs), "inputs": inputs, "results": _contents(session, stage)}
        write_json(stamp, {**made, "seconds": seconds, "peak_bytes": measure_memory()})
        session.say(f"{stage.name}: done in {seconds} s")
    wait()


def _reason_to_run(session: Session, stage: Stage, inputs: dict[str, Any]) -> str | None:
    """Name what changed since the stage finished: inputs or results. None: nothing; empty: it has never finished."""
    try:
        stamp = read_written(session.folder.stamp(stage.name), Stamp)
        if stamp["made_from"] != fingerprint(inputs):
            return describe_changes(stamp["inputs"], inputs)
        contents, before = _contents(session, stage), stamp["results"]
        other = [name for name, content in contents.items() if not content or content != before.get(name)]
        return f"changed or missing: {', '.join(other)}" if other else stage.lost(session) or None
    except (OSError, InputError):
        return "its stamp or its results cannot be read" if session.folder.stamp(stage.name).exists() else ""


def _contents(session: Session, stage: Stage) -> dict[str, str]:
    """Map each result of a stage, by its path in the run folder, to its sha256; empty where it is missing."""
    return {str(path.relative_to(session.folder.root)): content_of(path) for path in stage.results(session)}


def _patient_wait(state: PartialState) -> Callable[[], Any]:
    """Make a barrier of all ranks that bears with stages of hours. Collective.

    The timeout of Accelerate's own barrier is that of training's collective operations, 10 to 30 minutes. To raise it
    would let training wait as long for a rank that hangs.
    """
    if not torch.distributed.is_initialized():
        return state.wait_for_everyone  # type: ignore[no-any-return]
    # gloo: the ranks wait on the CPU, and NCCL's watchdog does not take them for stuck.
    return partial(torch.distributed.barrier, torch.distributed.new_group(timeout=PATIENCE, backend="gloo"))


def local_inputs(recipe: Recipe, base: Path) -> dict[str, Path]:
    """Name the files and folders of this machine that a recipe reads, by the key that names them."""
    found: dict[str, Path] = {}
    rows = recipe.rows
    for split in rows.splits:
        key = rows.key_of(split)
        each = [path for source in rows.origins(split) for path in searched_paths(source.source, base)]
        found |= {f"file {number} of {key}" if len(each) > 1 else key: path for number, path in enumerate(each, 1)}
    if harness := harness_folder(recipe, base):
        found["evaluation.harness.folder"] = harness
    folders = {key: teacher_folder(model.model, base) for key, model in recipe.models.items()}
    return {**{key: folder for key, folder in folders.items() if folder is not None}, **found}


def harness_folder(recipe: Recipe, base: Path) -> Path | None:
    """Return the folder with the user's own tasks for lm-evaluation-harness; None where there is none."""
    given = recipe.evaluation.harness and recipe.evaluation.harness.folder
    return base / Path(given).expanduser() if given else None


def with_absolute_paths(recipe: Recipe, base: Path) -> Recipe:
    """Make the folders of a recipe independent of where it lies, for the copy in the run folder."""

    def absolute(path: str) -> str:
        expanded = Path(path).expanduser()
        return str(expanded if expanded.is_absolute() else (base / path).resolve()) if is_path(path) else path

    return recipe.with_paths(absolute)

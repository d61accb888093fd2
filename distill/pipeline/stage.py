"""A stage: what it is made from, what it leaves behind, its check and its work; and the rule by which it is skipped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list

from distill import __version__
from distill.errors import Stopped
from distill.files import content_of, write_json, write_text
from distill.pipeline.folder import RunDir
from distill.pipeline.session import Session
from distill.ranks import check_launch, process_state
from distill.recipe.load import dump, fingerprint
from distill.recipe.locate import is_path, teacher_folder
from distill.recipe.schema import Optimization, Recipe
from distill.training.provenance import describe_changes, flatten
from distill.training.signals import StopSignals

if TYPE_CHECKING:
    from accelerate import PartialState

PATIENCE = timedelta(days=30)
"""How long processes wait for the main one. The launcher ends them when it dies."""

WHEN_NOT_WHAT = {"save_every", "log_every", "evaluate_every", "keep_best", "trackers"}
HOW_NOT_WHAT = {"micro_batch_size", "loader_workers", "gradient_checkpointing", "compile"}
"""Keys that say when to look, or how to compute the same up to rounding: changing them neither reruns a stage nor voids
a checkpoint."""


def with_version(inputs: dict[str, Any]) -> dict[str, Any]:
    """Flatten what a result is made from to dotted keys, this version of distill included."""
    return flatten({**inputs, "distill": __version__})


def settings_of(spec: Optimization) -> dict[str, Any]:
    """Select the keys of a training that decide what it computes."""
    return spec.model_dump(mode="json", exclude=WHEN_NOT_WHAT | HOW_NOT_WHAT)


def results(*paths: Callable[[RunDir], Path]) -> Callable[[RunDir], list[Path]]:
    """The files and folders that a stage leaves behind."""
    return lambda run: [path(run) for path in paths]


def no_check(_session: Session) -> None:
    """Accept every recipe: the stage needs nothing that could be missing."""


@dataclass(frozen=True)
class Stage:
    """One step of the story."""

    name: str
    work: Callable[[Session], None]
    made_from: Callable[[Session], Any]
    """Everything the result depends on, as JSON."""
    results: Callable[[RunDir], Sequence[Path]]
    wanted: Callable[[Recipe], bool] = lambda _recipe: True
    """Whether the recipe asks for it at all."""
    together: bool = False
    """Every process takes part; other stages are done by the main one while the rest wait."""
    check: Callable[[Session], None] = no_check
    """Raises InputError before anything is done, when the recipe asks for something that this stage cannot do."""
    check_data: Callable[[Session], None] = no_check
    """The same for what the data must have; runs once the first stage has prepared them."""


def check_stages(session: Session, stages: Sequence[Stage]) -> None:
    """Find every mistake that can be found before the first stage, so that none is found after hours.

    Raises:
        InputError: From the first check that fails.
    """
    for stage in stages:
        stage.check(session)


def run_stages(session: Session, stages: Sequence[Stage], story: Sequence[Stage] = ()) -> None:
    """Run each stage that the recipe asks for and whose inputs or results changed.

    Args:
        session: The recipe at work.
        stages: The stages to bring up to date; the first prepares the data.
        story: Stages whose demands on the data are checked, also where a later command runs them.

    Raises:
        InputError: The run folder is in use, or the data lack what a stage needs.
    """
    state = process_state()
    check_launch(state.num_processes, state.device.type)
    wait = _patient_wait(state)
    if not state.is_main_process:
        _run_all(session, stages, story, wait)
        return
    with session.folder.locked():
        write_text(session.folder.recipe, dump(with_absolute_paths(session.recipe, session.base)))
        _run_all(session, stages, story, wait)


def _run_all(session: Session, stages: Sequence[Stage], story: Sequence[Stage], wait: Callable[[], Any]) -> None:
    for number, stage in enumerate(stages):
        _run(session, stage, wait)
        for each in (story or stages) if number == 0 else ():
            each.check_data(session)


def _patient_wait(state: PartialState) -> Callable[[], Any]:
    """A barrier of all processes that bears with stages of hours; every process must call this.

    The timeout of Accelerate's own barrier is that of training's collective operations, 10 to 30 minutes. To raise it
    would let training wait as long for a process that hangs.
    """
    if not torch.distributed.is_initialized():
        return state.wait_for_everyone  # type: ignore[no-any-return]
    # gloo: the processes wait on the CPU, and NCCL's watchdog does not take them for stuck.
    return partial(torch.distributed.barrier, torch.distributed.new_group(timeout=PATIENCE, backend="gloo"))


def local_inputs(recipe: Recipe, base: Path) -> dict[str, Path]:
    """Name the files and folders of this machine that a recipe reads, by the key that names them."""
    resolved = with_absolute_paths(recipe, base)
    found = {"data.source": Path(resolved.data.source)} if is_path(recipe.data.source) else {}
    teacher = teacher_folder(recipe.teacher.model, base)
    return found if teacher is None else {"teacher.model": teacher, **found}


def with_absolute_paths(recipe: Recipe, base: Path) -> Recipe:
    """The recipe with folders that no longer depend on where it lies, for the copy in the run folder."""

    def absolute(path: str) -> str:
        expanded = Path(path).expanduser()
        return str(expanded if expanded.is_absolute() else (base / path).resolve()) if is_path(path) else path

    teacher = recipe.teacher.model_copy(update={"model": absolute(recipe.teacher.model)})
    data = recipe.data.model_copy(update={"source": absolute(recipe.data.source)})
    return recipe.model_copy(update={"teacher": teacher, "data": data})


def _run(session: Session, stage: Stage, wait: Callable[[], Any]) -> None:
    if not stage.wanted(session.recipe):
        return
    if StopSignals.pending:
        raise Stopped("by a signal; the same command continues from the last finished stage")
    state = process_state()
    made_from: dict[str, Any] = {}
    due = [True]
    if state.is_main_process:
        made_from = with_version(stage.made_from(session))
        reason = _reason_to_run(session.folder, stage, made_from)
        due[0] = reason is not None
        if reason:
            session.say(f"{stage.name}: runs again ({reason})")
    wait()  # to read large folders takes long as well
    if state.num_processes > 1:
        broadcast_object_list(due)
    if not due[0]:
        session.say(f"{stage.name}: unchanged, skipped")
        return
    start = time.monotonic()
    session.say(f"{stage.name}: started")
    if state.is_main_process:
        session.folder.stamp(stage.name).unlink(missing_ok=True)
    if stage.together or state.is_main_process:
        stage.work(session)
    wait()
    if state.is_main_process:
        results = {
            str(path.relative_to(session.folder.root)): content_of(path) for path in stage.results(session.folder)
        }
        seconds = round(time.monotonic() - start, 1)
        stamp = {"made_from": fingerprint(made_from), "inputs": made_from, "results": results, "seconds": seconds}
        write_json(session.folder.stamp(stage.name), stamp)
        session.say(f"{stage.name}: done in {seconds} s")
    wait()


def _reason_to_run(run: RunDir, stage: Stage, made_from: dict[str, Any]) -> str | None:
    """Name what changed since the stage finished: inputs or results. None: nothing; empty: it has never finished."""
    try:
        stamp = json.loads(run.stamp(stage.name).read_text(encoding="utf-8"))
        if stamp["made_from"] != fingerprint(made_from):
            return describe_changes(stamp["inputs"], made_from)
        results = {str(path.relative_to(run.root)): content_of(path) for path in stage.results(run)}
        other = [name for name, content in results.items() if not content or content != stamp["results"].get(name)]
        return f"changed or missing: {', '.join(other)}" if other else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ""

"""A recipe at work in a run folder, and the rule by which its stages are run or skipped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from distill import __version__
from distill.data import Corpus, Texts, read_texts, tokenise
from distill.errors import InputError, Stopped
from distill.evaluation.arms import AGAINST_TEACHER
from distill.models.load import Head, load_model, load_tokenizer, teacher_path, trained_labels
from distill.recipe.load import dump, fingerprint
from distill.recipe.locate import is_path
from distill.recipe.schema import Recipe
from distill.rundir import RunDir, content_of, write_json, write_text
from distill.training.guards import StopSignals, check_launch, processes

PATIENCE = timedelta(days=30)
"""How long processes wait for the main one. The launcher ends them when it dies."""


@dataclass(frozen=True)
class Session:
    """One recipe at work in one run folder, with what several stages need loaded once."""

    recipe: Recipe
    base: Path
    """Folder that the recipe's relative paths start from."""
    run: RunDir
    say: Callable[[str], None]
    remote_code: bool = False

    @cached_property
    def source(self) -> Path:
        """Local folder of the teacher as the recipe names it."""
        return teacher_path(self.recipe.teacher, self.base, self.remote_code)

    @property
    def teacher(self) -> Path:
        """Local folder of the teacher that distils: fitted, or as the recipe names it."""
        return self.run.teacher if self.recipe.teacher.fit else self.source

    @cached_property
    def tokenizer(self) -> Any:
        """The teacher's tokenizer."""
        return load_tokenizer(self.source, self.remote_code)

    @cached_property
    def texts(self) -> Texts:
        """The split texts."""
        texts = read_texts(self.recipe.data, self.recipe.seed, self.base)
        if self.recipe.teacher.fit or not texts.classes:
            return texts
        # A teacher that is already trained keeps its own order of classes.
        order = trained_labels(self.source)
        unknown = sorted(set(texts.classes) - set(order))
        if unknown:
            raise InputError(
                f"the data has the classes {', '.join(unknown)}, the teacher knows {', '.join(order)}: rename them, "
                f"or add `fit` under `teacher:` to train it on these classes"
            )
        return replace(texts, classes=tuple(order))

    @cached_property
    def corpus(self) -> Corpus:
        """The split token ids."""
        return tokenise(self.texts, self.recipe.data, self.tokenizer)

    @cached_property
    def head(self) -> Head:
        """The task's model class and class names."""
        return Head(self.corpus.task.auto_class, self.corpus.classes, self.corpus.padding)

    @property
    def metrics(self) -> list[str]:
        """Metrics of every arm, the headline first."""
        asked = self.recipe.evaluation.metrics or self.corpus.task.metrics
        return list(dict.fromkeys([*asked, *AGAINST_TEACHER]))

    @property
    def vocabulary(self) -> int | None:
        """Entries of the vocabulary that are tokens; heads are often padded beyond. None for class heads."""
        return len(self.tokenizer) if self.corpus.task.head == "next_token" else None

    @property
    def start(self) -> Path:
        """The model that training starts from: the student as cut, or repaired where the recipe asks for it."""
        return self.run.repaired if self.recipe.student.repair.wanted else self.run.student

    @property
    def arms(self) -> list[str]:
        """The arms that this recipe makes, of those that it measures."""
        wanted = self.recipe.student.repair.wanted
        return [arm for arm in self.recipe.evaluation.arms if arm != "repaired" or wanted]

    def arm_folder(self, arm: str) -> Path:
        """The model of one arm of the evaluation."""
        own = {
            "teacher": self.teacher,
            "cut": self.run.student,
            "repaired": self.run.repaired,
            "distilled": self.run.distilled,
        }
        return own[arm] if arm in own else self.run.control_model(arm)

    def load(self, folder: Path, int8_on: torch.device | None = None) -> Any:
        """A model with the task's head and all its weights; in 8 bits, on a device, where that is given."""
        return load_model(folder, self.head, remote_code=self.remote_code, int8_on=int8_on)


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


def run_stages(session: Session, stages: Sequence[Stage]) -> None:
    """Run each stage that the recipe asks for and whose inputs or results changed.

    Raises:
        InputError: The run folder is in use.
    """
    state = processes()
    check_launch(state.num_processes, state.device.type)
    wait = _patient_wait(state)
    if not state.is_main_process:
        for stage in stages:
            _run(session, stage, wait)
        return
    with session.run.locked():
        write_text(session.run.recipe, dump(with_absolute_paths(session.recipe, session.base)))
        for stage in stages:
            _run(session, stage, wait)


def _patient_wait(state: PartialState) -> Callable[[], Any]:
    """A barrier of all processes that bears with stages of hours; every process must call this.

    The timeout of Accelerate's own barrier is that of training's collective operations, 10 to 30 minutes. To raise it
    would let training wait as long for a process that hangs.
    """
    if not torch.distributed.is_initialized():
        return state.wait_for_everyone  # type: ignore[no-any-return]
    # gloo: the processes wait on the CPU, and NCCL's watchdog does not take them for stuck.
    return partial(torch.distributed.barrier, torch.distributed.new_group(timeout=PATIENCE, backend="gloo"))


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
    state = processes()
    made_from = ""
    due = [True]
    if state.is_main_process:
        made_from = fingerprint({"distill": __version__, "stage": stage.name, "from": stage.made_from(session)})
        due[0] = not _finished(session.run, stage, made_from)
    wait()  # to read large folders takes long as well
    if state.num_processes > 1:
        broadcast_object_list(due)
    if not due[0]:
        session.say(f"{stage.name}: unchanged, skipped")
        return
    start = time.monotonic()
    session.say(f"{stage.name}: started")
    if state.is_main_process:
        session.run.stamp(stage.name).unlink(missing_ok=True)
    if stage.together or state.is_main_process:
        stage.work(session)
    wait()
    if state.is_main_process:
        results = {str(path.relative_to(session.run.root)): content_of(path) for path in stage.results(session.run)}
        seconds = round(time.monotonic() - start, 1)
        write_json(session.run.stamp(stage.name), {"made_from": made_from, "results": results, "seconds": seconds})
        session.say(f"{stage.name}: done in {seconds} s")
    wait()


def _finished(run: RunDir, stage: Stage, made_from: str) -> bool:
    """Whether the stamp says the same inputs, and the results still have the content that it recorded."""
    try:
        stamp = json.loads(run.stamp(stage.name).read_text(encoding="utf-8"))
        results = {str(path.relative_to(run.root)): content_of(path) for path in stage.results(run)}
        return bool(stamp["made_from"] == made_from and stamp["results"] == results and all(results.values()))
    except (OSError, ValueError, LookupError, TypeError):
        return False

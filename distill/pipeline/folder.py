"""The paths of a run, the run folders that are refused, and the lock that keeps two runs apart."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.files import put_back

LOCK = ".lock"
"""Every run folder holds it, which is how one is told from a folder of the user's."""
FILES = (".json", ".jsonl", ".safetensors", ".arrow", ".html", ".yaml")
"""Endings of what is a file in every run."""
LINKING_TRACKERS = ("wandb",)
"""Folders of trackers that put links into them, if they are told to write here."""


class _Inside:
    """A path inside the run folder; a child run has those that are `shared` from its parent."""

    def __init__(self, relative: str, *, shared: bool = False):
        self.relative, self.shared = relative, shared

    def __get__(self, run: RunDir, _owner: Any = None) -> Path:
        return (run.parent if self.shared else run.root) / self.relative


class RunDir:
    """The paths where stages meet; results that no other stage reads are named by their stage alone."""

    recipe = _Inside("recipe.yaml")
    """The resolved recipe, every default written out."""
    data = _Inside("data", shared=True)
    """The tokenised examples of each split, and the facts about them."""
    fit = _Inside("fit", shared=True)
    """Checkpoints and metrics of the teacher's training."""
    teacher = _Inside("teacher", shared=True)
    """The fitted teacher."""
    calibration = _Inside("calibration.safetensors", shared=True)
    """Statistics of the calibration pass."""
    plan = _Inside("plan.json", shared=True)
    """The student plan."""
    examined = _Inside("teacher.json", shared=True)
    """The teacher's own figures on held-out examples."""
    student = _Inside("student", shared=True)
    """The student as cut, before training."""
    repaired = _Inside("repaired", shared=True)
    """The student after repair, before training; only where the recipe asks for it."""
    repair = _Inside("repair.json", shared=True)
    """The held-out loss after each step of the repair."""
    cached = _Inside("teacher_cache.json")
    """Where the teacher's cached outputs lie, and what they are; only where the recipe asks for them."""
    distilled = _Inside("distilled")
    """The student after training."""
    predictions = _Inside("predictions")
    """The predictions of each arm on the test split, one row per example, in `ARM.safetensors`."""
    evaluation = _Inside("evaluation.json")
    """All arms, measured."""
    report = _Inside("report.html")
    """The HTML report."""
    release = _Inside("release")
    """The folder that is handed out."""

    def __init__(self, root: Path, parent: Path | None = None):
        self.root = root
        self.parent = root if parent is None else parent

    def child(self, seed: int) -> RunDir:
        """Return the run folder of another seed, which shares the results that no seed changes."""
        return RunDir(self.root / "seeds" / str(seed), self.root)

    def control(self, arm: str) -> Path:
        """Return the folder of the training of a control arm."""
        return self.root / "controls" / arm

    def start(self, arm: str) -> Path:
        """Return the folder of the model that was drawn for an arm to start from."""
        return self.control(arm) / "start"

    def stamp(self, stage: str) -> Path:
        """Return the file that says what a finished stage was made from."""
        return self.root / "stages" / f"{stage}.json"

    def check(self, inputs: Mapping[str, Path]) -> None:
        """Refuse a run folder in which something of the user's could be overwritten or mistaken for a result.

        Args:
            inputs: Paths that the run reads, by the name that the user gave it: the recipe, the teacher, data.

        Raises:
            InputError: The folder is, holds or lies in an input; it is not empty and no run folder; or links lie in it.
        """
        root = self.root.resolve()
        for name, path in inputs.items():
            given = path.resolve()
            inside = given.is_dir() and root.is_relative_to(given)
            if given.is_relative_to(root) or inside:
                relation = "is" if given == root else "lies in" if inside else "holds"
                raise InputError(
                    f"--out: the run folder {self.root} {relation} {name} ({path}), which the run would overwrite; "
                    f"name another folder"
                )
        if not self.root.exists():
            return
        if not self.root.is_dir():
            raise InputError(f"--out: {self.root} is a file; name a folder")
        if any(self.root.iterdir()) and not (self.root / LOCK).exists():
            raise InputError(f"--out: {self.root} is not empty and no run folder; name another, or an empty one")
        written = (path for path in self.root.iterdir() if path.name not in LINKING_TRACKERS)
        for link in _links(written):
            if link.is_dir() and not link.is_symlink():
                raise InputError(f"--out: {link} is a folder, where a run has a file; remove it")
            kind = "a link" if link.is_symlink() else "no regular file"
            raise InputError(f"--out: {link} is {kind}; a run folder holds none, as a run would write to its target")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run folder for this process, and finish what a killed run left half done.

        Raises:
            InputError: Another run is using it, or it cannot be made.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            lost = f" to {self.root.readlink()}, which is not there" if self.root.is_symlink() else ""
            problem = f"it is a link{lost}; make it, or give another --out" if lost else error.strerror
            raise InputError(f"{self.root} cannot be the run folder: {problem}") from error
        with os.fdopen(descriptor, "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = f" ({found})" if (found := file.read().strip()) else ""
                raise InputError(
                    f"{self.root} is in use by another distill run{holder}; "
                    f"wait for it, or give this one another --out or `name=…`"
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            for aside in [*self.root.rglob(".[!.]*.old")]:
                put_back(aside.with_name(aside.name[1 : -len(".old")]))
            yield


def _links(paths: Iterable[Path]) -> Iterator[Path]:
    """Find symbolic links, pipes and the like, and folders with the names of files, among some paths and below them."""
    for path in paths:
        for found in (path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else ())):
            if found.is_symlink() or not (found.is_file() or (found.is_dir() and found.suffix not in FILES)):
                yield found

"""One folder per run: every path in it, and files that are either complete or not there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import InputError


@dataclass(frozen=True)
class TrainDir:
    """What one training leaves behind."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """Published checkpoints, `step-00000100` each."""
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON record per line."""
        return self.root / "metrics.jsonl"


@dataclass(frozen=True)
class RunDir:
    """Paths of a run; stages meet here and nowhere else."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe, every default written out."""
        return self.root / "recipe.yaml"

    @property
    def teacher(self) -> Path:
        """The fitted teacher."""
        return self.root / "teacher"

    @property
    def fit(self) -> TrainDir:
        """Training of the teacher."""
        return TrainDir(self.root / "fit")

    @property
    def calibration(self) -> Path:
        """Statistics of the calibration pass."""
        return self.root / "calibration.safetensors"

    @property
    def plan(self) -> Path:
        """The student plan."""
        return self.root / "plan.json"

    @property
    def student(self) -> Path:
        """The student as cut, before training."""
        return self.root / "student"

    @property
    def repaired(self) -> Path:
        """The student after repair, before training; only where the recipe asks for it."""
        return self.root / "repaired"

    @property
    def repair(self) -> Path:
        """What each step of the repair was worth."""
        return self.root / "repair.json"

    @property
    def training(self) -> TrainDir:
        """Training of the student; its checkpoints and metrics lie in the run folder itself."""
        return TrainDir(self.root)

    @property
    def distilled(self) -> Path:
        """The student after training."""
        return self.root / "distilled"

    def control(self, arm: str) -> TrainDir:
        """Training of a control arm."""
        return TrainDir(self.root / "controls" / arm)

    def control_model(self, arm: str) -> Path:
        """A control arm after training."""
        return self.root / "controls" / arm / "model"

    @property
    def evaluation(self) -> Path:
        """All arms, measured."""
        return self.root / "evaluation.json"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.root / "report.html"

    @property
    def release(self) -> Path:
        """The folder that is handed out."""
        return self.root / "release"

    def stamp(self, stage: str) -> Path:
        """What a finished stage was made from."""
        return self.root / "stages" / f"{stage}.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run folder for this process. Raises InputError when another run is using it."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.root} cannot be the run folder: {error.strerror}") from error
        with (self.root / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = f" ({found})" if (found := file.read().strip()) else ""
                raise InputError(
                    f"{self.root} is in use by another distill run{holder}; "
                    f"wait for it, or give this one another `name=…`"
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_of(path: Path) -> str:
    """One sha256 over a file, or over the names and contents of all files below a folder. Empty when missing."""
    if path.is_file():
        return sha256_of(path)
    if not path.is_dir():
        return ""
    listing = {str(file.relative_to(path)): sha256_of(file) for file in sorted(path.rglob("*")) if file.is_file()}
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a file's content at once: readers see the old text or the new one, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; refuses NaN, which is not JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    shutil.rmtree(path, ignore_errors=True)
    os.rename(temporary, path)
    fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Every path of a run, and the lock that keeps two runs apart."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distill.errors import InputError
from distill.training import TrainDir


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

    def trained_controls(self) -> list[Path]:
        """List the models of all control arms that were trained."""
        return sorted(self.root.glob("controls/*/model"))

    @property
    def predictions(self) -> Path:
        """What each arm says about the test split, one row per example, in `ARM.safetensors`."""
        return self.root / "predictions"

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

"""Checkpoints are written behind training: a copy to host memory, and a thread that writes, sums and publishes it.

One is in flight: the next save waits for the one before, and a stop for the last. The thread takes no part in
collective operations: those of training run at the same time, and two threads of one rank could begin theirs in another
order than those of another. So ranks agree in the main thread, when a save begins (is there space?) and when it is
settled (has it worked everywhere?). In between each rank leaves the sums of its files as a note beside them, and the
thread of rank 0, which reads the notes, publishes without asking anybody: a checkpoint is there as soon as it is
written, whatever training does.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TypeVar

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError

from distill.errors import RunError, Stopped
from distill.ranks import free_memory, process_state
from distill.training.checkpoint import Checkpoints, TrainState
from distill.training.flight import Flight
from distill.training.shards import OwnFile, TensorsByFile, gathered, own_files
from distill.training.snapshot import HostMemory

HEADROOM = 2**20
"""Bytes on the disk beside the tensors: headers, JSON, the folder itself."""
MOST_MEMORY = 0.8
"""Share of the free host memory that a copy may take."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Survey:
    """What a checkpoint takes of one rank, and what there is."""

    machine: str
    lacking: int
    """Bytes of host memory for its copy, beyond what it has for that already."""
    memory: int
    """Bytes of host memory that are free."""
    writes: bool
    size: int
    """Bytes that it writes."""
    disk: int
    """Bytes that are free on the disk; only on rank 0, which makes the folder."""


class CheckpointWriter:
    """Writes the checkpoints of one training, one after the other; on leaving its block, none is left half-written."""

    def __init__(self, checkpoints: Checkpoints, say: Callable[[str], None]):
        """Write nothing yet.

        Args:
            checkpoints: Where the training continues from.
            say: Receives notices.
        """
        self.checkpoints, self.say = checkpoints, say
        self.memory, self.ranks = HostMemory(say), process_state()
        self.flight: Flight | None = None
        self.prepared = False
        """True once the memory for copies was looked after."""
        self.in_place = False
        """True once host memory did not hold a copy, and that was said."""

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        # A second signal ends the process at once; after any other error what has been saved is not lost.
        if self.flight is not None and not (kind is not None and issubclass(kind, Stopped)):
            self.flight.leave()

    def prepare(self, tensors: TensorsByFile, *, whole: bool) -> None:
        """Have a thread take the memory for copies of such tensors: the first save need not wait for it. Collective."""
        files = own_files(tensors, self.ranks.process_index, self.ranks.num_processes, whole=whole)
        self.prepared = True
        if self._fits(on_all_ranks(lambda: self._survey(files, 0))):
            self.memory.take(files)

    def save(self, places: Sequence[Checkpoints], state: TrainState, tensors: TensorsByFile, *, whole: bool) -> None:
        """Copy a checkpoint and have it written to each of `places`, once the one before is published. Collective.

        Each rank writes its own pieces of what is sharded, rank 0 all else. What fails is raised here where there is
        too little space, otherwise when it is settled.

        Args:
            places: In the order of publication.
            state: Where training stands.
            tensors: Tensors by file, as they are in training.
            whole: Put together what is sharded.

        Raises:
            RunError: Not enough space, or the one before could not be written. Nothing is left of it.
        """
        self.settle()
        self.prepared = True
        files = own_files(tensors, self.ranks.process_index, self.ranks.num_processes, whole=whole)
        try:
            surveys = on_all_ranks(lambda: self._survey(files, self._make_drafts(places, state)))
            self._refuse_full_disk(surveys, places)
        except RunError as error:
            raise self._given_up(places, error) from error
        behind = self._fits(surveys)
        copied, await_copy = self.memory.copy(files) if behind else (gathered(files), lambda: None)
        others = [rank for rank, survey in enumerate(surveys) if rank and survey.writes]
        self.flight = Flight(places, replace(state), copied, await_copy, self.ranks.process_index, others)
        self.flight.thread.start()
        if not behind:
            self.settle()

    def settle(self) -> float:
        """Wait until the checkpoint in flight is published on all ranks. Collective.

        Returns:
            Seconds that it took to write, on the slowest rank; 0 where none was in flight.

        Raises:
            RunError: It could not be written, or has weights that are not finite. Nothing is left of it.
        """
        flight = self.flight
        if flight is None:
            return 0.0
        try:
            broken = sorted({name for names in on_all_ranks(flight.written.result) for name in names})
            if broken:
                raise RunError(f"weights are not finite ({', '.join(broken[:3])}): not saved")
            seconds = max(on_all_ranks(flight.finished.result))
        except RunError as error:
            self.flight = None
            flight.cancel()
            raise self._given_up(flight.places, error) from error
        self.flight = None
        return seconds

    def last_good(self) -> str:
        """Name for messages the checkpoint that the same command continues from; the one in flight is waited for."""
        if self.flight is not None:
            self.flight.leave()
        return self.checkpoints.last_good()

    def _make_drafts(self, places: Sequence[Checkpoints], state: TrainState) -> int:
        """Make the folders, on rank 0: they are there once all ranks have answered. Returns bytes free on the disk."""
        return min(place.make_draft(state.step) for place in places) if self.ranks.is_main_process else 0

    def _survey(self, files: Sequence[OwnFile], disk: int) -> _Survey:
        size, writes = sum(file.size for file in files), any(file.written for file in files)
        return _Survey(socket.gethostname(), self.memory.lacking(files), free_memory(), writes, size, disk)

    def _refuse_full_disk(self, surveys: Sequence[_Survey], places: Sequence[Checkpoints]) -> None:
        free, need = surveys[0].disk, HEADROOM + len(places) * sum(survey.size for survey in surveys)
        if free < need:
            raise RunError(
                f"a checkpoint needs {need / 1e6:,.2f} MB and {self.checkpoints.folder} has {free / 1e6:,.2f} MB left: "
                f"not saved. Make space, and the same command continues from the last checkpoint"
            )

    def _fits(self, surveys: Sequence[_Survey]) -> bool:
        """Tell, the same on all ranks, whether every machine's memory holds the copies of its ranks."""
        for machine in {survey.machine for survey in surveys}:
            here = [survey for survey in surveys if survey.machine == machine]
            need, free = sum(survey.lacking for survey in here), min(survey.memory for survey in here)
            if need > MOST_MEMORY * free:
                if not self.in_place:
                    self.say(
                        f"checkpoints are written in place, and training waits for it: their copy would take "
                        f"{need / 1e9:,.1f} GB of the {free / 1e9:,.1f} GB of host memory that are free"
                    )
                self.in_place = True
                return False
        return True

    def _given_up(self, places: Sequence[Checkpoints], error: RunError) -> RunError:
        """Remove what is left of a checkpoint, and complete the message."""
        if self.ranks.is_main_process:
            for place in places:
                place.discard_drafts()
        return RunError(f"{error}; {self.checkpoints.last_good()}")


def on_all_ranks(action: Callable[[], T]) -> list[T]:
    """Gather what `action` returns on each rank, in their order. Collective.

    Raises:
        RunError: Files cannot be written by at least one of them. It is raised on all: none waits in vain.
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    outcomes = gather_object([(result, None if failure is None else f"{failure}" or type(failure).__name__)])
    if failure is not None and not isinstance(failure, OSError | SafetensorError):
        raise failure
    said = [message for _, message in outcomes if message is not None]
    if said:
        raise RunError(f"a checkpoint cannot be written: {'; '.join(dict.fromkeys(said))}") from failure
    return [result for result, _ in outcomes]


@contextmanager
def out_of_resources(writer: CheckpointWriter) -> Iterator[None]:
    """Turn an error of memory or of a loader worker into a RunError that names the last good checkpoint."""
    try:
        yield
    except torch.OutOfMemoryError as error:  # not of a forward or backward pass, which are taken again
        raise RunError(f"out of memory: {error}; {writer.last_good()}") from error
    except RuntimeError as error:
        # Of a worker that died torch tells from a signal handler, wherever the main thread is just then.
        if "DataLoader" not in str(error):
            raise
        raise RunError(f"a loader worker is dead or hangs: {error}; {writer.last_good()}") from error

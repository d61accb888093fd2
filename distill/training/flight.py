"""One checkpoint between its copy and its publication, and the thread that takes it there."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence

import torch

from distill.files import write_text
from distill.training.checkpoint import Checkpoints, TrainState
from distill.training.shards import OwnFile, write

NOTE = ".sums-{:05d}.json"
"""In the folder of a draft, from each rank but the first: the sums of its files, which are on the disk."""
PATIENCE = 10.0
"""Seconds that a training which ends with an error waits for the notes of ranks that may be dead."""


class Flight:
    """Writes the files of this rank, and on rank 0 publishes them with those of the others."""

    def __init__(
        self,
        places: Sequence[Checkpoints],
        state: TrainState,
        files: Sequence[OwnFile],
        await_copy: Callable[[], None],
        rank: int,
        others: Sequence[int],
    ):
        """Begin nothing yet.

        Args:
            places: Where it is published, in this order.
            state: Where training stood.
            files: What this rank writes.
            await_copy: Returns when the tensors are there.
            rank: This one.
            others: Ranks beside the first that write files.
        """
        self.places, self.state, self.files, self.await_copy = places, state, files, await_copy
        self.rank, self.others = rank, others
        self.thread = threading.Thread(target=self.run, name="checkpoint", daemon=True)
        self.written, self.cancelled = threading.Event(), threading.Event()
        self.failure: Exception | None = None
        self.broken: list[str] = []
        self.seconds = 0.0

    def start(self) -> None:
        """Begin."""
        self.thread.start()

    def run(self) -> None:
        """Write the files of this rank, then publish, or leave a note for the rank that does."""
        start = time.monotonic()
        try:
            self.await_copy()
            self.broken = _not_finite(self.files)
            if not self.broken:
                sums = [write(place.draft(self.state.step), self.files) for place in self.places]
                if self.rank == 0:
                    self.written.set()
                    self._publish(sums)
                elif self.files:
                    self._leave_notes(sums)
        except Exception as error:  # raised again in the main thread
            self.failure = error
        self.seconds = time.monotonic() - start
        self.written.set()

    def _leave_notes(self, sums: Sequence[dict[str, str]]) -> None:
        for place, own in zip(self.places, sums, strict=True):
            write_text(place.draft(self.state.step) / NOTE.format(self.rank), json.dumps(own))

    def _publish(self, sums: Sequence[dict[str, str]]) -> None:
        """Publish each once the files of all ranks are there; not where it was cancelled before."""
        for place, own in zip(self.places, sums, strict=True):
            for rank in self.others:
                note = place.draft(self.state.step) / NOTE.format(rank)
                while not note.exists():
                    if self.cancelled.wait(0.05):
                        return
                own |= json.loads(note.read_text(encoding="utf-8"))
                note.unlink()
            place.publish(self.state, own)

    def await_files(self) -> list[str]:
        """Wait until the files of this rank are on the disk; returns the names of weights that are not finite."""
        self.written.wait()
        if self.failure is not None:
            raise self.failure
        return self.broken

    def await_publication(self) -> float:
        """Wait until the thread is done, which on rank 0 publishes; returns the seconds that it took."""
        self.thread.join()
        if self.failure is not None:
            raise self.failure
        return self.seconds

    def cancel(self) -> None:
        """Have rank 0 not wait for notes that will not come, and wait until nothing more is written."""
        self.cancelled.set()
        self.thread.join()

    def leave(self) -> None:
        """Let it come to its end, but do not wait for ever for ranks that may be dead."""
        self.written.wait()
        self.thread.join(PATIENCE if self.others else None)
        self.cancel()


def _not_finite(files: Sequence[OwnFile]) -> list[str]:
    """Name the weights that are not finite."""
    weights = [file.tensors for file in files if file.name.startswith(("model.", "model-"))]
    floats = [(name, own) for part in weights for name, own in part.items() if own.is_floating_point() and own.numel()]
    # The extremes are not finite where anything is not; one pass, without a tensor of flags.
    return [name for name, own in floats if not torch.stack(torch.aminmax(own)).isfinite().all()]

"""One checkpoint between its copy and its publication, and the thread that takes it there."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait

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
        self.cancelled = threading.Event()
        self.written: Future[list[str]] = Future()
        """Done once the files and the notes of this rank are on the disk; the names of weights that are not finite."""
        self.finished: Future[float] = Future()
        """Done with the thread, which on rank 0 publishes; the seconds that it took."""

    def run(self) -> None:
        """Write the files of this rank, then publish, or leave a note for the rank that does."""
        start = time.monotonic()
        try:
            self.await_copy()
            broken = _not_finite(self.files)
            sums = [write(place.draft(self.state.step), self.files) for place in self.places if not broken]
            if self.rank and self.files and not broken:
                self._leave_notes(sums)  # before the ranks agree that all is written: rank 0 waits for it
            self.written.set_result(broken)
            if self.rank == 0 and not broken:
                self._publish(sums)
            self.finished.set_result(time.monotonic() - start)
        except Exception as error:  # raised again in the main thread
            for future in (self.written, self.finished):
                if not future.done():
                    future.set_exception(error)

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

    def cancel(self) -> None:
        """Have rank 0 not wait for notes that will not come, and wait until nothing more is written."""
        self.cancelled.set()
        self.thread.join()

    def leave(self) -> None:
        """Let it come to its end, but do not wait for ever for ranks that may be dead."""
        wait([self.written])
        self.thread.join(PATIENCE if self.others else None)
        self.cancel()


def _not_finite(files: Sequence[OwnFile]) -> list[str]:
    """Name the weights that are not finite."""
    weights = [file.tensors for file in files if file.name.startswith(("model.", "model-"))]
    floats = [(name, own) for part in weights for name, own in part.items() if own.is_floating_point() and own.numel()]
    # The extremes are not finite where anything is not; one pass, without a tensor of flags.
    return [name for name, own in floats if not torch.stack(torch.aminmax(own)).isfinite().all()]

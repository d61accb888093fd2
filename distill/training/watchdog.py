"""A watchdog for ranks that hang: ends this process when a step, evaluation or save takes far too long."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 45.0
"""Seconds that a step may take before the other ranks are given up; more where steps have taken long."""
FIRST_PATIENCE = 900.0
"""Seconds for the first step, which may have to compile, the first evaluation and the first save."""


class Watchdog:
    """Ends this process when a step, evaluation or save takes so long that another rank must be dead or hang.

    A collective operation with a rank that hangs would wait for half an hour or for ever, and cannot be interrupted.
    """

    def __init__(self, say: Callable[[str], None], *, active: bool):
        self.say = say
        self.seen: dict[str, tuple[int, float]] = {}
        """Kind -> (count, seconds of the slowest). The first, which may compile, counts until the second."""
        self.deadline: float | None = None
        if active:
            threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Around each step, evaluation or save, each of which has its own times."""
        count, slowest = self.seen.get(what, (0, 0.0))
        start = time.monotonic()
        self.deadline = start + (max(PATIENCE, 5 * slowest) if count else FIRST_PATIENCE)
        try:
            yield
        finally:
            self.deadline = None
            self.seen[what] = count + 1, max(slowest if count > 1 else 0.0, time.monotonic() - start)

    def note(self, what: str, seconds: float) -> None:
        """Count what took so long in a thread, such as writing a checkpoint that a later step waits for."""
        count, slowest = self.seen.get(what, (0, 0.0))
        self.seen[what] = count, max(slowest, seconds)

    def _watch(self) -> None:
        while True:
            time.sleep(1)
            deadline = self.deadline
            if deadline is not None and time.monotonic() > deadline:
                self.say("error: the other processes do not answer: one is dead or hangs; the same command continues")
                os._exit(1)

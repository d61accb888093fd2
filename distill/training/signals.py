"""Signal handling: stop after the current step, leave in time outside of training, and end with the launcher."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from distill.errors import Stopped

_PR_SET_PDEATHSIG = 1


class StopSignals:
    """While active, SIGTERM and SIGINT set `requested` instead of ending the process; the loop stops after its step."""

    active = False
    """True while a training is under way in this process."""
    pending = False
    """True after a signal outside of training; libraries may have swallowed the exception that it raised."""

    def __init__(self) -> None:
        self.requested = StopSignals.pending
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        StopSignals.active = True
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_error: object) -> None:
        StopSignals.active = False
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Tell whether a signal has come."""
        return self.requested

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise Stopped("by a second signal, at once; the same command continues from the last published checkpoint")
        self.requested = True


@contextmanager
def leaving_in_time(seconds: float = 20.0) -> Iterator[None]:
    """Inside the block, a process that got a signal outside of training is gone after so many seconds, with code 75.

    Python's own handlers wait for the main thread, which may be waiting for other processes.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while number := os.read(reading, 1):
            if number[0] in (signal.SIGTERM, signal.SIGINT) and not StopSignals.active:
                StopSignals.pending = True
                time.sleep(seconds)
                if not StopSignals.active:  # otherwise it is going to save and leave after its step
                    os._exit(Stopped.exit_code)
        os.close(reading)

    StopSignals.pending = False
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writing)  # ends the thread


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when its parent dies (Linux).

    A one-process `accelerate launch` dies of SIGTERM at once and does not pass it on.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)

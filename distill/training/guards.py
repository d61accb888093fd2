"""Signals, and launches that are not what they seem."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from distill.errors import InputError, Stopped


class StopSignals:
    """While active, SIGTERM and SIGINT set `requested` instead of ending the process; the loop stops after its step."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise Stopped("by a second signal, at once; the same command continues from the last published checkpoint")
        self.requested = True


def check_launch(processes: int) -> None:
    """Refuse a launch whose processes do not know of each other: they would all write the same files.

    Args:
        processes: What Accelerate sees.

    Raises:
        InputError: The launcher started more processes than Accelerate sees.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != processes:
        raise InputError(
            f"the launcher started {started} processes, but each of them runs alone. On CPU use:\n"
            f"  ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {started} scripts/train.py RECIPE"
        )


def processes() -> PartialState:
    """Who this process is among those that were launched together."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))

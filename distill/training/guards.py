"""Signals, launches that are not what they seem, and processes that outlive or wait for others in vain."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from distill.errors import InputError, Stopped

SCRIPT = "scripts/train.py RECIPE"
PATIENCE = 45.0
"""Seconds that a step may take before the other processes are given up; more where steps have taken long."""
FIRST_PATIENCE = 900.0
"""Seconds for the first step, which may have to compile, the first evaluation and the first save."""
_PR_SET_PDEATHSIG = 1


class StopSignals:
    """While active, SIGTERM and SIGINT set `requested` instead of ending the process; the loop stops after its step."""

    active = False
    """Whether a training is under way in this process."""
    pending = False
    """Whether a signal came outside of training; libraries may have swallowed the exception that it raised."""

    def __init__(self) -> None:
        self.requested = StopSignals.pending
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        StopSignals.active = True
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        StopSignals.active = False
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether a signal has come."""
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


class Watchdog:
    """Ends this process when a step, evaluation or save takes so long that another process must be dead or hang.

    A collective operation with a process that hangs would wait for half an hour or for ever, and cannot be interrupted.
    """

    def __init__(self, say: Callable[[str], None], *, active: bool):
        self.say = say
        self.seen: dict[str, tuple[int, float]] = {}
        """What -> how often, and seconds of the slowest. The first, which may compile, counts until the second."""
        self.deadline: float | None = None
        if active:
            threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def over(self, what: str) -> Iterator[None]:
        """Around each step, evaluation or save, each of which has its own times."""
        count, slowest = self.seen.get(what, (0, 0.0))
        start = time.monotonic()
        self.deadline = start + (max(PATIENCE, 5 * slowest) if count else FIRST_PATIENCE)
        try:
            yield
        finally:
            self.deadline = None
            self.seen[what] = count + 1, max(slowest if count > 1 else 0.0, time.monotonic() - start)

    def _watch(self) -> None:
        while True:
            time.sleep(1)
            deadline = self.deadline
            if deadline is not None and time.monotonic() > deadline:
                self.say("error: the other processes do not answer: one is dead or hangs; the same command continues")
                os._exit(1)


def processes() -> PartialState:
    """Who this process is among those that were launched together.

    Raises:
        InputError: DeepSpeed was asked for and is not installed.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise InputError("the launch asks for DeepSpeed, which is not installed: pip install 'distill[deepspeed]'")
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `accelerate launch` or `torchrun` started this process."""
    return "ACCELERATE_MIXED_PRECISION" in environment or "TORCHELASTIC_RUN_ID" in environment


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when its parent dies (Linux).

    A one-process `accelerate launch` dies of SIGTERM at once and does not pass it on.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def check_launch(processes: int, device: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a launch that does something else than it seems to.

    Args:
        processes: What Accelerate sees.
        device: The kind of device that Accelerate trains on, e.g. `cpu`.
        environment: What the launcher has set.

    Raises:
        InputError: With the command that does what was meant.
    """
    started = int(environment.get("WORLD_SIZE", "1"))
    right = f"  ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {max(2, started)} {SCRIPT}"
    if started != processes:
        # They would all believe that they are the main one, and write the same files.
        message = f"the launcher started {started} processes, but each of them runs alone. On CPU use:\n{right}"
        raise InputError(message)
    # For several processes without `--multi_gpu` or a GPU, `accelerate launch` sets an address and starts one.
    alone = environment.get("MASTER_ADDR") == "127.0.0.1" and "WORLD_SIZE" not in environment
    if alone and "ACCELERATE_MIXED_PRECISION" in environment:
        raise InputError(
            f"accelerate launch was asked for several processes and started one, as it does with --cpu. Use:\n{right}\n"
            f"or, for one process:\n  accelerate launch --num_processes 1 {SCRIPT}"
        )
    for name, flag in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        if device == "cpu" and parse_flag(environment.get(flag, "false")):
            raise InputError(f"{name} was asked for, which on a CPU silently becomes DDP. Without GPUs use:\n{right}")


def parse_flag(text: str) -> bool:
    """A flag as Accelerate's launcher writes it."""
    return text.lower() in ("1", "true", "yes", "y", "on", "t")

"""Training logs: metrics.jsonl, optional trackers, and a progress display."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import reprlib
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from distill.errors import InputError
from distill.files import write_text

QUIET_SECONDS = 10.0
"""At most one line in so many seconds, that of the last step aside."""


class Tracker:
    """Writes metrics.jsonl, passes records on to trackers, and shows progress; only on the main process."""

    def __init__(self, path: Path, title: str, start: int, steps: int, accelerator: Accelerator):
        self.path, self.title, self.steps, self.accelerator = path, title, steps, accelerator
        self.active = accelerator.is_main_process
        self.said = -math.inf
        console = Console(stderr=True)
        columns = (BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(), "{task.fields[memory]}")
        self.progress = Progress(
            "{task.description}",
            *columns,
            console=console,
            refresh_per_second=2,
            speed_estimate_period=3600,
            disable=not (self.active and console.is_terminal),
        )
        self.task = self.progress.add_task(title, total=steps, completed=start, memory="")
        if self.active:
            path.parent.mkdir(parents=True, exist_ok=True)
            drop_after(path, start)

    def __enter__(self) -> Tracker:
        if self.accelerator.log_with:
            self.accelerator.init_trackers(f"{self.path.parent.name}-{self.title}")
        self.progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.progress.stop()
        if self.accelerator.log_with:
            self.accelerator.end_training()

    def advance(self, step: int) -> None:
        """Move the progress bar of a terminal."""
        self.progress.update(self.task, completed=step, memory=f"{measure_memory() / 1e9:.1f} GB")

    def record(self, record: Mapping[str, Any]) -> None:
        """Append one record, and print it unless another was printed just before."""
        if self.accelerator.log_with:
            self.accelerator.log(dict(numbers_in(record)), step=record["step"])
        if not self.active:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if time.monotonic() - self.said >= QUIET_SECONDS or record["step"] == self.steps:
            self.said = time.monotonic()
            line = f"{self.title} {record['step']}/{self.steps} {summary(record)}"
            self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)


def check_trackers(names: Sequence[str]) -> None:
    """Raise InputError when the package of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"training.trackers: {name} is not installed: pip install 'distill[{name}]'")


def measure_memory() -> int:
    """Measure the most bytes since `forget_peak`: on the GPU where there is one, else resident in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def forget_peak() -> None:
    """Begin to measure the most memory anew; a system that cannot goes on from the start of the process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def numbers_in(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Flatten a record to its numbers: `a/b` -> value."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from numbers_in(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield prefix + key, value


def drop_after(path: Path, step: int) -> None:
    """Drop records of steps that a resumed run is going to do again, and a half-written last line."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _step_of(line) <= step]
    write_text(path, "".join(line + "\n" for line in kept))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read all records of a metrics.jsonl; none when there is no file. Raises InputError where it holds others."""
    if not path.exists():
        return []
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it, and what it recorded is lost") from error
    if odd := [record for record in records if not isinstance(record, dict)]:
        raise InputError(
            f"{path} is damaged (it holds {reprlib.repr(odd[0])}); remove it, and what it recorded is lost"
        )
    return records


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError, RecursionError):  # the process was killed while writing this line
        return math.inf


def summary(record: Mapping[str, Any]) -> str:
    """Format a record as one line."""
    if record["event"] == "evaluate":
        return "held out: " + "  ".join(f"{name} {_short(value)}" for name, value in record["metrics"].items())
    terms = "  ".join(f"{name} {_short(value)}" for name, value in record["terms"].items())
    skipped = f"  {record['skipped']} skipped" if record["skipped"] else ""
    speed = f"{record['tokens_per_s']:,.0f} tokens/s"
    if record["mfu"] is not None:
        note = "; above 1: the rate of matrix products was measured too low, it is measured again"
        speed += f" (MFU {record['mfu']:.0%}{note if record['mfu'] > 1 else ''})"
    return f"loss {_short(record['loss'])} ({terms})  lr {record['lr']:.2e}  {speed}{skipped}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"

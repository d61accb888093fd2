"""Training logs: metrics.jsonl, optional trackers, and a progress display."""

from __future__ import annotations

import importlib.util
import json
import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from distill.errors import InputError
from distill.files import write_text

QUIET_SECONDS = 10.0
"""Off a terminal, at most one line in so many seconds."""


class Tracker:
    """Writes metrics.jsonl, passes records on to trackers, and shows progress; only on the main process."""

    def __init__(self, path: Path, title: str, start: int, steps: int, accelerator: Accelerator):
        self.path, self.title, self.start, self.steps = path, title, start, steps
        self.accelerator = accelerator
        self.active = accelerator.is_main_process
        self.console = Console(stderr=True)
        self.said = -math.inf
        self.began = time.monotonic()
        self.step = start
        self.latest: dict[str, Mapping[str, Any]] = {}
        self.live = Live(
            get_renderable=self._block, console=self.console, refresh_per_second=2, auto_refresh=self._on_terminal
        )
        if self.active:
            path.parent.mkdir(parents=True, exist_ok=True)
            drop_after(path, start)

    @property
    def _on_terminal(self) -> bool:
        return self.active and self.console.is_terminal

    def __enter__(self) -> Tracker:
        if self.accelerator.log_with:
            self.accelerator.init_trackers(f"{self.path.parent.name}-{self.title}")
        if self._on_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()
        if self.accelerator.log_with:
            self.accelerator.end_training()

    def record(self, record: Mapping[str, Any]) -> None:
        """Append one record and show it."""
        if self.accelerator.log_with:
            self.accelerator.log(dict(numbers_in(record)), step=record["step"])
        if not self.active:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.latest[record["event"]] = record
        if not self._on_terminal and (time.monotonic() - self.said >= QUIET_SECONDS or record["step"] == self.steps):
            self.said = time.monotonic()
            line = f"{self.title} {record['step']}/{self.steps} {summary(record)}"
            self.console.print(line, markup=False, soft_wrap=True)

    def _block(self) -> Table:
        """Draw what a terminal shows: progress and time, the loss, speed and memory, the last evaluation."""
        table = Table.grid(padding=(0, 2))
        done = self.step - self.start
        left = (time.monotonic() - self.began) / done * (self.steps - self.step) if done else None
        clock = "" if left is None else f"{timedelta(seconds=round(left))} left"
        bar = ProgressBar(total=self.steps, completed=self.step, width=24)
        table.add_row(self.title, bar, f"{self.step}/{self.steps}", clock, f"{memory_gb():.1f} GB")
        block = Table.grid()
        block.add_row(table)
        for record in self.latest.values():
            block.add_row(Text("  " + summary(record)))
        return block


def check_trackers(names: Sequence[str]) -> None:
    """Raise InputError when the package of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"training.trackers: {name} is not installed: pip install 'distill[{name}]'")


def memory_gb() -> float:
    """Measure peak memory of this process so far, in 10^9 bytes: of the GPU where there is one, resident otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


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
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    write_text(path, "".join(line + "\n" for line in kept))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read all records of a metrics.jsonl; none when there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):  # the process was killed while writing this line
        return math.inf


def summary(record: Mapping[str, Any]) -> str:
    """Format a record as one line."""
    if record["event"] == "evaluate":
        return "held out: " + "  ".join(f"{name} {_short(value)}" for name, value in record["metrics"].items())
    terms = "  ".join(f"{name} {_short(value)}" for name, value in record["terms"].items())
    skipped = f"  {record['skipped']} skipped" if record["skipped"] else ""
    speed = f"{record['tokens_per_s']:,.0f} tokens/s"
    if record["mfu"] is not None:
        speed += f" (MFU {record['mfu']:.0%})"
    return f"loss {_short(record['loss'])} ({terms})  lr {record['lr']:.2e}  {speed}{skipped}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"

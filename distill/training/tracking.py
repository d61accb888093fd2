"""What a training tells: a line of JSON per interval for machines, a progress bar or a rare line for people."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distill.rundir import write_text

QUIET_SECONDS = 10.0
"""Off a terminal, at most one line in so many seconds."""


class Tracker:
    """Writes metrics.jsonl and shows progress; on processes other than the main one it does nothing."""

    def __init__(self, path: Path, title: str, start: int, steps: int, *, active: bool):
        self.path = path
        self.active = active
        self.title = title
        self.steps = steps
        self.console = Console(stderr=True)
        self.live = active and self.console.is_terminal
        self.said = -math.inf
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=self.console,
            disable=not self.live,
        )
        self.bar = self.progress.add_task(title, total=steps, completed=start, detail="")
        if active:
            path.parent.mkdir(parents=True, exist_ok=True)
            drop_after(path, start)

    def __enter__(self) -> Tracker:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self.progress.update(self.bar, completed=step)

    def record(self, record: Mapping[str, Any]) -> None:
        """Append one record and show it."""
        if not self.active:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        detail = _summary(record)
        if self.live:
            self.progress.update(self.bar, detail=detail)
        elif time.monotonic() - self.said >= QUIET_SECONDS or record["step"] == self.steps:
            self.said = time.monotonic()
            self.console.print(f"{self.title} {record['step']}/{self.steps} {detail}", markup=False, soft_wrap=True)


def drop_after(path: Path, step: int) -> None:
    """Forget records of steps that a resumed run is going to do again, and a half-written last line."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    write_text(path, "".join(line + "\n" for line in kept))


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl; none when there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):  # the process was killed while writing this line
        return math.inf


def _summary(record: Mapping[str, Any]) -> str:
    if record["event"] == "evaluate":
        return "  ".join(f"{name} {value:.4g}" for name, value in record["metrics"].items() if value is not None)
    parts = "  ".join(f"{name} {value:.4g}" for name, value in record["parts"].items())
    return f"loss {record['loss']:.4g} ({parts})  lr {record['lr']:.2e}  {record['examples_per_s']:.0f} examples/s"

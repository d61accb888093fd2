"""A form: one more file or folder of a release, for one runtime, with what writes, runs and describes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.models.forward import Outputs
from distill.release.export import ask_fresh_process

Probe = Mapping[str, Tensor]
"""Inputs of a model, by name."""
Answers = dict[str, Tensor]
"""Outputs by name."""
Ask = Callable[[dict[str, Tensor]], Outputs]


@dataclass(frozen=True)
class Form:
    """One way to hand a student out beside the folder of transformers."""

    title: str
    """Format, runtime and precision, for the card."""
    extra: str
    """Extra of distill that installs `packages`."""
    packages: tuple[str, ...]
    """Modules that writing and running it imports."""
    path: str
    """What the runtime loads, relative to the release."""
    refuse: Callable[[Any, str], str]
    """(config, Auto class) -> why no model of this kind can have the form; empty: it can."""
    write: Callable[[Path, Any, Sequence[Any], Probe], None] | None
    """(release, student in fp32, tokenizer and feature extractor, probe) -> files below the release. None: the files
    are those of the row before it."""
    program: str
    """Python that reads `{path, pairs: [[probe, answer], …], threads, …settings}` from its argument and runs the form
    on each probe; it does not import distill."""
    answer: Callable[[Any, Probe], Answers]
    """(student in fp32, probe) -> what the program must say, at real positions only."""
    example: Callable[[str, str], str]
    """(Auto class, folder) -> Python for the card that loads and runs it, and prints something short, always the same.
    It is run before the release, beside a folder of that name."""
    settings: Callable[[Any, str], dict[str, Any]] = lambda _model, _path: {}
    """(student, path) -> what the program is told besides."""
    tolerance: float | Callable[[Any], float] | None = 1e-4
    """Largest difference from the student, as a share of the largest output or of 1, or student -> it. None: rounded to
    8 bits, so the metrics of the run are measured on it instead."""
    ask: Callable[[Path, Any], Ask | None] | None = None
    """(path, student) -> a callable that answers batches in the student's place, for forms without tolerance; None
    where the runtime gives no predictions."""


def always(_config: Any, _auto_class: str) -> str:
    """Refuse nothing."""
    return ""


def run_fresh(
    program: str, path: Path, probes: Sequence[Probe], settings: Mapping[str, Any], title: str
) -> list[Answers]:
    """Run the program of a form in a fresh process; returns what it says of each probe. Raises RunError if it fails."""
    with TemporaryDirectory() as scratch:
        pairs = [[str(Path(scratch) / f"{kind}{at}") for kind in ("probe", "answer")] for at in range(len(probes))]
        for each, (given, _) in zip(probes, pairs, strict=True):
            save_file({name: tensor.contiguous() for name, tensor in each.items()}, given)
        asked = {"path": str(path), "pairs": pairs, "threads": torch.get_num_threads(), **settings}
        ask_fresh_process(program, asked, scratch, title)
        return [load_file(answered) for _, answered in pairs]

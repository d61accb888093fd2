"""A prepared corpus: the examples of each split in memory-mapped Arrow files, and the facts about them as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill.data.arrow import ArrowFile
from distill.data.tasks.task import Ragged, Settled, Task
from distill.errors import InputError
from distill.files import content_of, read_object, sha256_of, write_json

FACTS = "corpus.json"


class Examples(ArrowFile):
    """The examples of one split, n of them: the features of the task, `labelled`, and `row`, an example's row."""

    def __getitem__(self, index: int) -> np.ndarray:
        """Token ids of one example, int32 [L]."""
        ids: Ragged = self.take([index])["input_ids"]
        return ids.flat

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [n] tokens per example."""
        return self.columns["input_ids"].lengths

    def highest(self, name: str = "input_ids") -> int:
        """Return the highest token id of a feature."""
        return max(int(part.max(initial=0)) for part in self.columns[name].content())

    @cached_property
    def labelled(self) -> np.ndarray:
        """Bool [n], the example has a label."""
        return self.columns["labelled"].take(range(len(self)))  # type: ignore[return-value]


@dataclass(frozen=True)
class Corpus:
    """All splits, ready for batching."""

    task: Task
    settled: Settled
    splits: dict[str, Examples]
    """`train`, `test`, `validation` where anything looks at it, and the sets as `sets.NAME`."""
    padding: int
    """Token id that fills short rows; never looked at, the attention mask hides it."""
    fingerprint: str
    """sha256 over every feature of every split but the sets, and the classes: what is measured besides changes no
    training."""
    summary: dict[str, Any]
    """Counts of rows, classes and tokens, for people."""
    constants: dict[str, Any] = field(default_factory=dict)
    """What collating needs beside the features, see `Task.constants`."""
    sets: dict[str, str] = field(default_factory=dict)
    """Name of a split of `evaluation.sets` -> hash of its features."""

    @property
    def head(self) -> str:
        """The kind of predictions, a name from `distill.losses.PREDICTION_KINDS`."""
        return self.settled.head

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by index; empty for tasks without classes."""
        return self.settled.classes

    @property
    def train(self) -> Examples:
        """Examples to train on."""
        return self.splits["train"]

    @property
    def validation(self) -> Examples | None:
        """Examples to look at during training; None where nothing looks."""
        return self.splits.get("validation")

    @property
    def test(self) -> Examples:
        """Examples that only the evaluation sees."""
        return self.splits["test"]

    @property
    def labelled(self) -> Sequence[int]:
        """Training examples that have a label."""
        found: list[int] = np.flatnonzero(self.train.labelled).tolist()
        return found


def save_facts(corpus: Corpus, folder: Path) -> None:
    """Write what is not in the Arrow files of a corpus, and the checksums of these."""
    facts = {name: getattr(corpus, name) for name in ("padding", "fingerprint", "summary", "constants", "sets")}
    files = {name: sha256_of(examples.path) for name, examples in corpus.splits.items()}
    write_json(folder / FACTS, {"settled": asdict(corpus.settled), **facts, "files": files})


def check_files(folder: Path) -> None:
    """Refuse a corpus whose files are not those that were written. Raises InputError."""
    for name, content in read_object(folder / FACTS)["files"].items():
        if content_of(folder / f"{name}.arrow") != content:
            raise InputError(f"{folder / name}.arrow is not what was written")


def load_corpus(folder: Path, task: Task) -> Corpus:
    """Read a corpus; its examples are mapped into memory.

    Raises:
        InputError: The folder does not hold one.
    """
    try:
        facts = read_object(folder / FACTS)
        splits = {name: Examples(folder / f"{name}.arrow") for name in dict(facts.pop("files"))}
        for examples in (splits["train"], splits["test"], *splits.values()):
            len(examples)
        settled = facts.pop("settled")
        return Corpus(task, Settled(**{**settled, "classes": tuple(settled["classes"])}), splits, **facts)
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        raise InputError(f"{folder} holds no tokenised corpus: {error}") from error

"""A prepared corpus: the examples of each split in memory-mapped Arrow files, and the facts about them as JSON."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill.data.tasks.task import Ragged, Settled, Task
from distill.errors import InputError
from distill.files import read_object, write_json

FACTS = "corpus.json"


@dataclass(frozen=True)
class Examples:
    """The examples of one split, n of them; they stay in their file until they are looked at."""

    path: Path
    """An Arrow file of the features of the task, `labelled`, and `row`, the number of an example's row."""

    def __reduce__(self) -> Any:
        return Examples, (self.path,)  # a loader worker maps the file by itself

    @cached_property
    def table(self) -> pa.Table:
        """The file, mapped into memory."""
        with pa.memory_map(str(self.path)) as file:
            return pa.ipc.open_stream(file).read_all()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> np.ndarray:
        """Token ids of one example, int32 [L]."""
        ids: np.ndarray = self._columns["input_ids"].take([index]).flat
        return ids

    def take(self, indices: Sequence[int], names: Collection[str] | None = None) -> dict[str, Any]:
        """Return these features, or all, of some examples: `Ragged` for lists, arrays for numbers, lists for texts."""
        return {name: column.take(indices) for name, column in self._columns.items() if names is None or name in names}

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [n] tokens per example."""
        return np.concatenate([np.diff(offsets) for offsets, _ in self._columns["input_ids"].chunks])

    def highest(self, name: str = "input_ids") -> int:
        """Return the highest token id of a feature."""
        return int(pa.compute.max(self.table.column(name).combine_chunks().flatten()).as_py())

    @cached_property
    def labelled(self) -> np.ndarray:
        """Bool [n], the example has a label."""
        found: np.ndarray = self._columns["labelled"].values
        return found

    @cached_property
    def _columns(self) -> dict[str, Any]:
        kinds = {field.name: field.type for field in self.table.schema}
        return {
            name: (_Lists if pa.types.is_list(kind) else _Texts if pa.types.is_large_string(kind) else _Numbers)(
                self.table.column(name)
            )
            for name, kind in kinds.items()
        }


class _Lists:
    """A column of lists of numbers, each chunk as views of the file."""

    def __init__(self, column: pa.ChunkedArray):
        self.starts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])
        self.chunks = [(chunk.offsets.to_numpy().astype(np.int64), chunk.values.to_numpy()) for chunk in column.chunks]

    def take(self, indices: Sequence[int]) -> Ragged:
        found = []
        numbers = np.searchsorted(self.starts, indices, side="right") - 1
        for number, index in zip(numbers, indices, strict=True):
            offsets, values = self.chunks[number]
            place = index - self.starts[number]
            found.append(values[offsets[place] : offsets[place + 1]])
        return Ragged(np.concatenate(found), np.array([len(each) for each in found]))


class _Numbers:
    """A column of numbers, in memory."""

    def __init__(self, column: pa.ChunkedArray):
        self.values = column.to_numpy()

    def take(self, indices: Sequence[int]) -> np.ndarray:
        found: np.ndarray = self.values[list(indices)]
        return found


class _Texts:
    """A column of texts."""

    def __init__(self, column: pa.ChunkedArray):
        self.column = column

    def take(self, indices: Sequence[int]) -> list[str]:
        return [self.column[int(index)].as_py() for index in indices]


@dataclass(frozen=True)
class Corpus:
    """All splits, ready for batching."""

    task: Task
    settled: Settled
    splits: dict[str, Examples]
    """`train`, `test`, and `validation` where anything looks at it."""
    padding: int
    """Token id that fills short rows; never looked at, the attention mask hides it."""
    fingerprint: str
    """sha256 over every feature of every split, and the classes."""
    summary: dict[str, Any]
    """Counts of rows, classes and tokens, for people."""

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
    """Write what is not in the Arrow files of a corpus."""
    facts = {"padding": corpus.padding, "fingerprint": corpus.fingerprint, "summary": corpus.summary}
    write_json(folder / FACTS, {"settled": asdict(corpus.settled), **facts})


def load_corpus(folder: Path, task: Task) -> Corpus:
    """Read a corpus; its examples are mapped into memory.

    Raises:
        InputError: The folder does not hold one.
    """
    try:
        facts = read_object(folder / FACTS)
        splits = {name: Examples(folder / f"{name}.arrow") for name in facts["summary"]}
        for examples in splits.values():
            len(examples)  # maps the file
        settled = Settled(**{**facts["settled"], "classes": tuple(facts["settled"]["classes"])})
        return Corpus(task, settled, splits, facts["padding"], facts["fingerprint"], facts["summary"])
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        raise InputError(f"{folder} holds no tokenised corpus: {error}") from error

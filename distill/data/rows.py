"""The rows of each split as they are read: judged, hashed and written to memory-mapped Arrow files.

In memory are some eighty bytes per row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from distill.data.sources import read_source
from distill.data.tasks.task import Column, Task, as_json
from distill.errors import InputError
from distill.recipe.names import OPTIONAL_COLUMNS
from distill.recipe.schema import Data, Source

BLOCK = 1000
"""Rows that are read, written or encoded at once."""
DRAWS = ("split", "validation", "weight")
"""What is drawn for each row: rows with a small number go to the test split, to the validation split, or count once
more where the weight of their source is no whole number."""


@dataclass(frozen=True)
class Rows:
    """The rows of one split as read, and the hashes that decide what becomes of them; n rows."""

    table: Any
    """`datasets.Dataset` with the task's columns and `place`, memory-mapped."""
    keys: np.ndarray
    """bytes [n], sha256 of what the model is given of a row."""
    answers: np.ndarray
    """int64 [n], hash of what is asked for; 0 where there is no label."""
    draws: np.ndarray
    """float64 [n, 4] in [0, 1), from hashes of the same: see `DRAWS`; last, those that choose who keeps a label."""
    weights: np.ndarray
    """float64 [n], of the row's source."""
    empty: np.ndarray
    """bool [n], a text that the task needs is blank."""

    def __len__(self) -> int:
        return len(self.keys)


def columns_of(task: Task, spec: Data) -> dict[str, str]:
    """Map the columns that a task reads from the recipe's sources to their names there."""
    wanted = [role for role in task.columns if role not in OPTIONAL_COLUMNS or role in spec.columns]
    return {role: spec.columns.get(role, role) for role in wanted}


def read_split(split: str, task: Task, spec: Data, seed: int, base: Path, folder: Path) -> Rows:
    """Read all rows of a split into an Arrow file of the folder.

    Raises:
        InputError: A source is broken, has no such column, or a row holds something else than the task needs.
    """
    names = columns_of(task, spec)
    columns = {role: task.columns[role] for role in names}
    found = (
        (place, values, source.weight)
        for source in spec.origins(split)
        for place, values in islice(_read(source, split, spec.key_of(split), names, columns, base), source.limit)
    )
    return _collect(found, columns, seed, folder / f"{split}.rows.arrow")


def split_documents(rows: Rows, task: Task, spec: Data, seed: int, looks: bool, folder: Path) -> dict[str, Rows]:
    """Split each of a few long documents by place: its end is the test split, what comes before it the validation.

    A split by the hashes of whole documents would leave one side empty, or leave everything to chance.
    """
    test = 1 - spec.test_share
    ends = {"train": test * (1 - spec.validation_share) if looks else test, "validation": test, "test": 1.0}
    columns = {role: task.columns[role] for role in columns_of(task, spec)}
    found: dict[str, Rows] = {}
    start = 0.0
    for name, end in ends.items():
        if end > start:
            parts = (
                (row["place"], {"text": _between(row["text"], start, end)}, float(weight))
                for row, weight in zip(rows.table, rows.weights, strict=True)
            )
            found[name] = _collect(parts, columns, seed, folder / f"{name}.parts.arrow")
        start = end
    return found


def _between(text: str, start: float, end: float) -> str:
    """Return the lines of a document that begin between two shares of its length."""
    lines = text.splitlines(keepends=True)
    places = [0, *np.cumsum([len(line) for line in lines])]
    return "".join(line for line, place in zip(lines, places, strict=False) if start <= place / len(text) < end)


def _collect(
    found: Iterator[tuple[str, dict[str, Any], float]], columns: Mapping[str, Column], seed: int, path: Path
) -> Rows:
    """Write rows, given as place, values and weight, to an Arrow file, and hash them."""
    marks: list[tuple[bytes, int, tuple[float, ...], float, bool]] = []

    def blocks() -> Iterator[dict[str, list[str]]]:
        while part := list(islice(found, BLOCK)):
            block: dict[str, list[str]] = {role: [] for role in (*columns, "place")}
            for place, values, weight in part:
                texts = {role: values[role] if columns[role].plain else as_json(values[role]) for role in columns}
                marks.append((*_hash_row(texts, columns, values, seed), weight, _is_empty(values, columns)))
                for role, text in (*texts.items(), ("place", place)):
                    block[role].append(text)
            yield block

    table = write_arrow(path, blocks(), pa.schema([(role, pa.large_string()) for role in (*columns, "place")]))
    keys, answers, draws, weights, empty = zip(*marks, strict=True) if marks else ((),) * 5
    return Rows(
        table,
        np.array(keys, dtype="S32"),
        np.array(answers, dtype=np.int64),
        np.array(draws, dtype=np.float64).reshape(-1, len(DRAWS) + 1),
        np.array(weights, dtype=np.float64),
        np.array(empty, dtype=bool),
    )


def write_arrow(path: Path, blocks: Iterator[Mapping[str, Sequence[Any]]], schema: pa.Schema) -> Any:
    """Write blocks of columns to an Arrow file as they come; returns it as a memory-mapped `datasets.Dataset`."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for block in blocks:
            arrays = [pa.array(block[field.name], field.type) for field in schema]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return Dataset.from_file(str(path))


def _read(
    source: Source, split: str, key: str, names: Mapping[str, str], columns: Mapping[str, Column], base: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a source and judge its values; yields each row's place and its values by the task's names."""
    seen: set[str] = set()
    row: dict[str, Any] = {}
    files = {name for role, name in names.items() if columns[role].content}
    for place, row in read_source(source, split, set(names.values()), base, files):
        values = {}
        for role, name in names.items():
            given = row.get(name)
            try:
                values[role] = columns[role].read(given)
            except ValueError as error:
                raise InputError(f"data.{key}: {place}: column {name!r} {error}: {as_json(given)[:60]}") from error
        seen |= names.values() & row.keys()
        yield place, values
    if not row:
        raise InputError(f"data.{key}: {source.source} has no row")
    if lacking := [name for name in names.values() if name not in seen]:
        raise InputError(f"data.{key}: {source.source} has no column {lacking[0]!r}; it has {', '.join(row)}")


def _hash_row(
    texts: Mapping[str, str], columns: Mapping[str, Column], values: Mapping[str, Any], seed: int
) -> tuple[bytes, int, tuple[float, ...]]:
    """Hash what is given of a row, and what is asked for."""
    parts = {role: text if (read := columns[role].content) is None else read(text) for role, text in texts.items()}
    given = [parts[role] for role in texts if not columns[role].answer]
    asked = [texts[role] for role in texts if columns[role].answer and values[role] is not None]
    content = given[0] if len(given) == 1 else json.dumps(given)
    answer = int.from_bytes(_digest("\n".join(asked))[:7], "big") + 1 if asked else 0
    return _digest(content), answer, tuple(_share(f"{name}:{content}") for name in (*DRAWS, seed))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _share(text: str) -> float:
    """Draw a number in [0, 1) from a text; the same hash gave the split since the first version."""
    return int.from_bytes(_digest(text)[:4], "big") / 2**32


def _is_empty(values: Mapping[str, Any], columns: Mapping[str, Column]) -> bool:
    return any(not str(values[role]).strip() for role, column in columns.items() if column.plain and not column.answer)

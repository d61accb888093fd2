"""The rows of each split as they are read: judged, hashed and written to memory-mapped Arrow files.

In memory are some sixty bytes per row.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.arrow import ArrowFile, write_arrow
from distill.data.sources import read_source
from distill.data.tasks.task import Column, Task, as_json
from distill.errors import InputError
from distill.recipe.names import OPTIONAL_COLUMNS
from distill.recipe.schema import Data, Source

BLOCK = 1000
"""Rows that are read, written or encoded at once; fewer of long texts."""
BLOCK_CHARACTERS = 2**22
CUT_WITHIN = 2000
"""Characters within which a line or a word ends where a document is cut."""


@dataclass(frozen=True)
class Rows:
    """The rows of one split as read, and the hashes that decide what becomes of them; n rows."""

    file: ArrowFile
    """The task's columns, and `place`."""
    keys: np.ndarray
    """bytes [n], sha256 of what the model is given of a row."""
    answers: np.ndarray
    """int64 [n], hash of what is asked for; 0 where there is no label."""
    draws: np.ndarray
    """float64 [n] in [0, 1), from a hash of what is given: rows with a small number go to the test split."""
    label_draws: np.ndarray
    """float64 [n] in the same way; rows with small numbers keep their label. Empty where all keep it."""
    origins: np.ndarray
    """int64 [n], the source of a row, as an index of `sources`."""
    empty: np.ndarray
    """bool [n], a text that the task needs is blank."""
    sources: tuple[Source, ...]
    parts_of: int = 0
    """Documents that these rows are parts of, where long documents were split by place."""

    def __len__(self) -> int:
        return len(self.keys)

    def draw(self, number: int) -> np.ndarray:
        """Return float64 [n] in [0, 1), from four bytes of the keys; the first ones, as numbers, order the rows."""
        words = np.frombuffer(self.keys.tobytes(), dtype=">u4").reshape(-1, 8)
        return words[:, number] / 2**32


def columns_of(task: Task, spec: Data) -> dict[str, str]:
    """Map the columns that a task reads from the recipe's sources to their names there."""
    wanted = [role for role in task.columns if role not in OPTIONAL_COLUMNS or role in spec.columns]
    return {role: spec.columns.get(role, role) for role in wanted}


def read_split(split: str, task: Task, spec: Data, seed: int, base: Path, folder: Path) -> Rows:
    """Read all rows of a split into an Arrow file of the folder.

    Raises:
        InputError: A source is broken, has no such column, or a row holds something else than the task needs.
    """
    names, sources = columns_of(task, spec), spec.origins(split)
    columns = {role: task.columns[role] for role in names}
    found = (
        (place, values, number)
        for number, source in enumerate(sources)
        for place, values in _read(source, split, spec.key_of(split), names, columns, base)
    )
    return _collect(found, columns, sources, label_draw(spec, seed), folder / f"{split}.rows.arrow")


def label_draw(spec: Data, seed: int) -> str:
    """Name the draws that choose who keeps a label; empty where all keep theirs."""
    return "" if spec.labelled is None else str(seed)


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
                (place, {"text": text[_cut_at(text, start) : _cut_at(text, end)]}, number)
                for index, number in enumerate(rows.origins.tolist())
                for text, place in [(each[0] for each in rows.file.take([index]).values())]
            )
            path = folder / f"{name}.parts.arrow"
            found[name] = _collect(parts, columns, rows.sources, label_draw(spec, seed), path, len(rows))
        start = end
    return found


def _cut_at(text: str, share: float) -> int:
    """Return the place after the first line, or word, that ends behind a share of a text."""
    place = round(share * len(text))
    if 0 < place < len(text):
        ends = (text.find(mark, place, place + CUT_WITHIN) + 1 for mark in "\n ")
        return next((end for end in ends if end), place)
    return place


def _collect(
    found: Iterator[tuple[str, dict[str, Any], int]],
    columns: Mapping[str, Column],
    sources: list[Source] | tuple[Source, ...],
    labels: str,
    path: Path,
    parts_of: int = 0,
) -> Rows:
    """Write rows, given as place, values and number of the source, to an Arrow file, and hash them."""
    keys, answers, draws, label_draws = bytearray(), array("q"), array("d"), array("d")
    origins, empty = array("q"), bytearray()
    given = [role for role, column in columns.items() if not column.answer]
    asked = [role for role, column in columns.items() if column.answer]
    written = {role: _itself if column.plain else as_json for role, column in columns.items()}

    def blocks() -> Iterator[dict[str, list[str]]]:
        block: dict[str, list[str]] = {role: [] for role in (*columns, "place")}
        characters = 0
        for place, values, number in found:
            try:
                texts = {role: write(values[role]) for role, write in written.items()}
                content = texts[given[0]] if len(given) == 1 else json.dumps([texts[role] for role in given])
                keys.extend(_digest(content))
                answer = "\n".join(texts[role] for role in asked if values[role] is not None)
                answers.append(int.from_bytes(_digest(answer)[:7], "big") + 1 if answer else 0)
            except UnicodeEncodeError as error:
                raise InputError(
                    f"{place}: half of a surrogate pair is no text: {reprlib.repr(error.object)}"
                ) from error
            except (ValueError, RecursionError) as error:
                raise InputError(f"{place}: {error}") from error
            draws.append(_share("split:" + content))
            if labels:
                label_draws.append(_share(f"{labels}:{content}"))
            origins.append(number)
            empty.append(any(_is_empty(values[role]) for role in given))
            for role, text in texts.items():
                block[role].append(text)
            block["place"].append(place)
            characters += len(content)
            if len(block["place"]) == BLOCK or characters > BLOCK_CHARACTERS:
                yield block
                block, characters = {role: [] for role in block}, 0
        if block["place"]:
            yield block

    write_arrow(path, blocks())
    return Rows(
        ArrowFile(path),
        np.frombuffer(keys, dtype="S32"),
        np.frombuffer(answers, dtype=np.int64),
        np.frombuffer(draws, dtype=np.float64),
        np.frombuffer(label_draws, dtype=np.float64),
        np.frombuffer(origins, dtype=np.int64),
        np.frombuffer(empty, dtype=bool),
        tuple(sources),
        parts_of,
    )


def _read(
    source: Source, split: str, key: str, names: Mapping[str, str], columns: Mapping[str, Column], base: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a source and judge its values; yields each row's place and its values by the task's names."""
    readers: list[tuple[str, str, Callable[[Any], Any]]] = [
        (role, name, columns[role].read) for role, name in names.items()
    ]
    for place, row in read_source(source, split, set(names.values()), base):
        values = {}
        for role, name, read in readers:
            try:
                values[role] = read(row.get(name))
            except ValueError as error:
                given = reprlib.repr(row.get(name))
                raise InputError(f"data.{key}: {place}: column {name!r} {error}: {given}") from error
        yield place, values


def _itself(value: Any) -> Any:
    return value


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _share(text: str) -> float:
    """Draw a number in [0, 1) from a text; the same hash gave the split since the first version."""
    return int.from_bytes(_digest(text)[:4], "big") / 2**32


def _is_empty(value: Any) -> bool:
    """Tell whether a text that is given to the model is blank, or a list that is given has nothing in it."""
    return not value.strip() if isinstance(value, str) else value == []

"""What decides a corpus, and the rows of each split as read: judged, hashed and written to memory-mapped Arrow files.

In memory are some sixty bytes per row.
"""

from __future__ import annotations

import json
import reprlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.arrow import ArrowFile, write_arrow
from distill.data.sources import read_source
from distill.data.tasks.task import Column, Settled, Task
from distill.errors import InputError
from distill.recipe.names import OFFERED_COLUMNS, columns_read
from distill.recipe.schema import Data, Source

BLOCK = 1000
"""Rows that are read, written or encoded at once; fewer of long texts."""
BLOCK_CHARACTERS = 2**22
Found = tuple[str, dict[str, Any], int]
"""A row that was read: its place, its values by column, and the number of its source."""
CUT_WITHIN = 2000
"""Characters within which a line or a word ends where a document is cut."""
_WRITER = json.JSONEncoder(ensure_ascii=False, sort_keys=True, allow_nan=False)


@dataclass(frozen=True)
class Order:
    """All that decides a corpus, and nothing else."""

    task: Task
    spec: Data
    """The recipe's section."""
    tokenizer: Any
    """The teacher's."""
    seed: int
    """Chooses which training rows keep their label."""
    base: Path
    """Folder that relative paths start from."""
    looks: bool = False
    """Something looks at a validation split during training."""
    packs: bool = False
    """The teacher's family can tell documents apart that share a row."""
    teacher: Path | None = None
    """Folder of the teacher, for tasks that read more of it than the tokenizer."""
    routes: Mapping[str, int] = field(default_factory=dict)
    """Name of a source -> the feature `route` of its examples; empty: they have none."""
    own_order: Callable[[Settled], Settled] = lambda settled: settled
    """Puts the classes into the order of a teacher that is already trained. Raises InputError."""

    @property
    def names(self) -> dict[str, str]:
        """Map the columns that the task reads from the recipe's sources to their names there."""
        roles = columns_read(self.task.name, self.task.columns, self.spec.columns)
        return {role: self.spec.columns.get(role, role) for role in roles}

    @property
    def columns(self) -> dict[str, Column]:
        """Map the same columns to how they are read."""
        return {role: self.task.columns[role] for role in self.names}

    @property
    def asks(self) -> bool:
        """Tell whether the task has a column that is asked for."""
        return any(column.answer for column in self.task.columns.values())

    @property
    def draws(self) -> dict[str, str]:
        """Choose what is drawn for each row; the words are hashed with it.

        Training rows with small numbers go to the test split, or to the validation split, or count once more where the
        weight of their source is no whole number, or keep their label where only some do.
        """
        spec = self.spec
        draws = (
            ("test", "split", spec.test is None),
            ("validation", "validation", self.looks and spec.validation is None),
            ("weight", "weight", any(source.weight % 1 for source in spec.origins("train"))),
            ("labels", str(self.seed), spec.labelled is not None),
        )
        return {purpose: word for purpose, word, wanted in draws if wanted}


@dataclass(frozen=True)
class Rows:
    """The rows of one split as read, and the hashes that decide what becomes of them; n rows."""

    file: ArrowFile
    """The task's columns, and `place`."""
    keys: np.ndarray
    """bytes [n], sha256 of what the model is given of a row."""
    answers: np.ndarray
    """int64 [n], hash of what is asked for; 0 where there is no label."""
    draws: Mapping[str, np.ndarray]
    """Purpose, see `Order.draws` -> float64 [n] in [0, 1), from hashes of what is given."""
    origins: np.ndarray
    """int64 [n], the source of a row, as an index of `sources`."""
    empty: np.ndarray
    """bool [n], a text that the task needs is blank."""
    sources: tuple[Source, ...]
    parts_of: int = 0
    """Documents that these rows are parts of, where long documents were split by place."""

    def __len__(self) -> int:
        return len(self.keys)


def read_split(order: Order, split: str, folder: Path) -> Rows:
    """Read all rows of a split, `train`, `validation`, `test` or `sets.NAME`, into an Arrow file of the folder.

    Raises:
        InputError: A source is broken, has no such column, or a row holds something else than the task needs.
    """
    sources = order.spec.origins(split)
    found = (
        (place, values, number)
        for number, source in enumerate(sources)
        for place, values in islice(_read(order, source, split), source.limit)
    )
    return _collect(order, found, sources, folder / f"{split}.rows")


def split_documents(order: Order, rows: Rows, folder: Path) -> dict[str, Rows]:
    """Split each of a few long documents by place: its end is the test split, what comes before it the validation.

    A split by the hashes of whole documents would leave one side empty, or leave everything to chance.
    """
    test = 1 - order.spec.test_share
    train = test * (1 - order.spec.validation_share) if order.looks else test
    ends = {"train": train, "validation": test, "test": 1.0}
    found: dict[str, Rows] = {}
    start = 0.0
    for name, end in ends.items():
        if end > start:
            parts = (
                (place, {"text": text[_cut_at(text, start) : _cut_at(text, end)]}, number)
                for index, number in enumerate(rows.origins.tolist())
                for text, place in [(each[0] for each in rows.file.take([index]).values())]
            )
            found[name] = _collect(order, parts, rows.sources, folder / f"{name}.parts", len(rows))
        start = end
    return found


def _cut_at(text: str, share: float) -> int:
    """Return the place after the first line, or word, that ends behind a share of a text."""
    place = round(share * len(text))
    if 0 < place < len(text):
        ends = (text.find(mark, place, place + CUT_WITHIN) + 1 for mark in "\n ")
        return next((end for end in ends if end), place)
    return place


def _collect(order: Order, found: Iterator[Found], sources: Sequence[Source], path: Path, parts_of: int = 0) -> Rows:
    """Write rows to an Arrow file, and hash them."""
    columns, draws = order.columns, order.draws
    keys, answers, origins, empty = bytearray(), array("q"), array("q"), bytearray()
    drawn = {purpose: bytearray() for purpose in draws}
    given = [role for role, column in columns.items() if not column.answer]
    asked = [role for role, column in columns.items() if column.answer]

    def blocks() -> Iterator[dict[str, list[str]]]:
        for block in _blocks(found, columns):
            places, rows, numbers = map(list, zip(*block, strict=True))
            values = {role: [row[role] for row in rows] for role in columns}
            texts = {
                role: [each or "" for each in own] if columns[role].plain else _map(_as_json, own, places, role)
                for role, own in values.items()
            }
            contents = _encode([[*map(columns[role].content or str, texts[role])] for role in given], places)
            keys.extend(b"".join([sha256(content).digest() for content in contents]))
            for purpose, word in draws.items():
                start = f"{word}:".encode()
                drawn[purpose].extend(b"".join([sha256(start + content).digest()[:4] for content in contents]))
            said = [
                ["" if value is None else text for text, value in zip(texts[role], values[role], strict=True)]
                for role in asked
            ]
            answers.extend(_map(_hash_answer, zip(*said, strict=True), places) if asked else [0] * len(places))
            origins.extend(numbers)
            empty.extend(map(any, zip(*(map(_is_empty, values[role]) for role in given), strict=True)))
            yield {**texts, "place": places}

    write_arrow(path, blocks())
    return Rows(
        ArrowFile(path),
        np.frombuffer(keys, dtype="S32"),
        np.frombuffer(answers, dtype=np.int64),
        {purpose: np.frombuffer(digits, dtype=">u4") / 2**32 for purpose, digits in drawn.items()},
        np.frombuffer(origins, dtype=np.int64),
        np.frombuffer(empty, dtype=bool),
        tuple(sources),
        parts_of,
    )


def _blocks(found: Iterator[Found], columns: Mapping[str, Column]) -> Iterator[list[Found]]:
    """Gather rows to blocks of so many, or fewer where their texts are long."""
    plain = [role for role, column in columns.items() if column.plain]
    block: list[Found] = []
    characters = 0
    for row in found:
        block.append(row)
        characters += sum(len(row[1][role] or "") for role in plain)
        if len(block) == BLOCK or characters > BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _map(
    function: Callable[[Any], Any], values: Iterable[Any], places: Sequence[str], what: str = "content"
) -> list[Any]:
    """Apply a function to a value of each row. Raises InputError that names the first row where it cannot be."""
    found: list[Any] = []
    try:
        found.extend(map(function, values))
    except UnicodeEncodeError as error:
        given = reprlib.repr(error.object)
        raise InputError(f"{places[len(found)]}: half of a surrogate pair is no character: {given}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{places[len(found)]}: its {what} {error}") from error
    return found


def _as_json(value: Any) -> str:
    """Write a value as it is kept, the same for equal ones. Raises ValueError where JSON has no such value."""
    try:
        return _WRITER.encode(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"is nothing that JSON can hold ({error})") from error


def _encode(columns: list[list[str]], places: Sequence[str]) -> list[bytes]:
    """Encode what is given of each row: its text, or the JSON of several."""
    encoded = [_map(str.encode, texts, places) for texts in columns]
    return encoded[0] if len(columns) == 1 else [json.dumps(texts).encode() for texts in zip(*columns, strict=True)]


@lru_cache(maxsize=2**16)
def _hash_answer(texts: tuple[str, ...]) -> int:
    """Hash what is asked for of a row; 0 where nothing is given."""
    text = "\n".join(filter(None, texts))
    return int.from_bytes(sha256(text.encode()).digest()[:7], "big") + 1 if text else 0


def _read(order: Order, source: Source, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a source and judge its values; yields each row's place and its values by the task's names."""
    names, columns, key = order.names, order.columns, order.spec.key_of(split)
    offered = [role for role in OFFERED_COLUMNS if names.get(role) == role]
    seen: set[str] = set()
    row: dict[str, Any] = {}
    paths = [name for role, name in names.items() if columns[role].content]
    for place, row in read_source(source, split, set(names.values()), order.base, offered, paths):
        values = {}
        for role, name in names.items():
            try:
                values[role] = columns[role].read(row.get(name))
            except (ValueError, RecursionError) as error:
                given = reprlib.repr(row.get(name))
                raise InputError(f"{key}: {place}: column {name!r} {error}: {given}") from error
        try:
            values = order.task.check_row(values)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{key}: {place}: {error}") from error
        if offered:
            seen |= names.values() & row.keys()
        yield place, values
    if offered and len(offered) == len(names) and not seen:
        listed, fix = ", ".join(offered), f"columns: {{{offered[0]}: COLUMN}}"
        raise InputError(f"{key}: {source.source} has none of {listed}, but {', '.join(row)}; name them, as in {fix}")


def _is_empty(value: Any) -> bool:
    """Tell whether a text that is given to the model is blank, or a list that is given has nothing in it."""
    return not value.strip() if isinstance(value, str) else value == []

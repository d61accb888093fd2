"""Rows of JSON files: one object per line, or one list of objects, read a part at a time."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Collection, Iterator
from typing import Any, TextIO

LONGEST = 2**28
"""Characters of the longest line, item of a list or field; a file without line breaks would fill the memory."""
LISTED = 10
"""Names in a message; of the others there is the number."""
NEAR_THE_END = 16
"""Characters before the end of a text within which an error may only mean that the rest is not read yet."""
Row = tuple[int, dict[str, Any]]
"""Line of a file where a row begins (of a list in JSON: position of the item), and the values of its columns."""


def list_names(names: Collection[Any]) -> str:
    """Write names in quotes, the first ten and the number of the others."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(repr(name)[:60] for name in list(names)[:LISTED]) + more


def read_lines(file: TextIO) -> Iterator[str]:
    """Read lines of text. Raises ValueError where one never ends or holds bytes that no text has."""
    number = 0
    while line := file.readline(LONGEST):
        number += 1
        if len(line) == LONGEST:
            raise ValueError(f"line {number} has more than {LONGEST:,} characters")
        if "\0" in line:
            raise ValueError(f"line {number} holds a null byte: it is no text, or has another encoding")
        yield line


def json_rows(file: TextIO, _source: Any = None) -> Iterator[Row]:
    """Read one object per line, or one list of objects. Raises ValueError that names the line or the item."""
    start, first = file.read(1), 1
    while start.isspace():
        first += start == "\n"
        start = file.read(1)
    if start == "[":
        yield from _ListReader(file)
        return
    for number, line in enumerate(read_lines(file), start=first):
        text = start + line if number == first else line
        if text.strip():
            try:
                item = JSON.decode(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"line {number}: {getattr(error, 'msg', error)}; a row is one object on one line"
                ) from error
            if not isinstance(item, dict):
                raise ValueError(f"line {number} is no object with columns: {reprlib.repr(item)}")
            yield number, item


class _ListReader:
    """The objects of a list whose bracket is read already; only a part of the file is in memory."""

    def __init__(self, file: TextIO):
        self.file, self.text, self.place, self.number = file, "", 0, 0

    def __iter__(self) -> Iterator[Row]:
        while self.next_mark() != "]":
            if self.number:
                if self.next_mark() != ",":
                    raise ValueError(f"after item {self.number} stands {self.rest()}, neither a comma nor a bracket")
                self.place += 1
            self.number += 1
            if self.next_mark() != "{":
                raise ValueError(f"item {self.number} is no object with columns: {self.rest()}")
            yield self.number, self.decode()
        self.place += 1
        self.text += self.file.read(80)
        if self.text[self.place :].strip():
            raise ValueError(f"after its list stands {self.rest()}")

    def rest(self) -> str:
        """Quote what comes next."""
        return repr(self.text[self.place : self.place + 40])

    def next_mark(self) -> str:
        """Return the next character that is no space."""
        while (place := SPACE.match(self.text, self.place).end()) == len(self.text):  # type: ignore[union-attr]
            self.read_on()
        self.place = place
        return self.text[place]

    def decode(self) -> dict[str, Any]:
        """Return the object that begins here, and go behind it."""
        while True:
            try:
                item, self.place = JSON.raw_decode(self.text, self.place)
                return dict(item)
            except json.JSONDecodeError as error:
                if error.pos < len(self.text) - NEAR_THE_END and "Unterminated" not in error.msg:
                    raise ValueError(f"item {self.number}: {error.msg}") from error
                self.read_on()
            except (ValueError, RecursionError) as error:
                raise ValueError(f"item {self.number}: {error}") from error

    def read_on(self) -> None:
        more = self.file.read(max(2**16, len(self.text)))
        if not more or len(self.text) > LONGEST:
            problem = f"more than {LONGEST:,} characters are one item" if more else "its list does not end"
            raise ValueError(f"{problem}, at item {max(1, self.number)}")
        self.text, self.place = self.text[self.place :] + more, 0


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key stands twice among {list_names([key for key, _ in pairs])}")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


JSON = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)
SPACE = re.compile(r"\s*")

"""Rows of JSON files: one object per line, or one list of objects."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Iterator
from itertools import chain
from typing import Any, TextIO

LONGEST = 2**28
"""Characters of the longest line, list or field; a file without line breaks would fill the memory."""
LISTED = 10
"""Names in a message; of the others there is the number."""
Row = tuple[int, dict[str, Any]]
"""Line of a file where a row begins (of a list in JSON: position of the item), and the values of its columns."""


def list_names(names: Collection[Any]) -> str:
    """Write names in a line, the first ten and the number of the others."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join([*map(str, names)][:LISTED]) + more


def quote_names(names: Collection[Any]) -> str:
    """Write names in quotes, as `list_names` does."""
    return list_names([repr(name)[:60] for name in names])


def read_lines(file: TextIO, number: int = 0) -> Iterator[str]:
    """Read lines after line `number`. Raises ValueError where one never ends or holds bytes that no text has."""
    while line := file.readline(LONGEST):
        number += 1
        if len(line) == LONGEST:
            raise ValueError(f"line {number} has more than {LONGEST:,} characters")
        if "\0" in line:
            raise ValueError(f"line {number} holds a null byte: it is no text, or has another encoding")
        yield line


def json_rows(file: TextIO, _source: Any = None) -> Iterator[Row]:
    """Read one object per line, or one list of objects. Raises ValueError that names the line or the item."""
    first, text = next(
        ((number, line) for number, line in enumerate(read_lines(file), start=1) if line.strip()), (1, "")
    )
    if text.lstrip().startswith("["):
        text += file.read(LONGEST)
        if len(text) > LONGEST:
            raise ValueError(f"its list has more than {LONGEST:,} characters; write one object per line instead")
        for number, item in enumerate(JSON.decode(text), start=1):
            yield number, _checked(item, f"item {number}")
        return
    for number, line in enumerate(chain([text], read_lines(file, first)), start=first):
        if line.strip():
            try:
                item = JSON.decode(line)
            except (ValueError, RecursionError) as error:
                why = getattr(error, "msg", error)  # without the place within the line
                raise ValueError(f"line {number}: {why}; a row is one object on one line") from error
            yield number, _checked(item, f"line {number}")


def _checked(item: Any, place: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ValueError(f"{place} is no object with columns: {reprlib.repr(item)}")
    return item


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key stands twice among {quote_names([key for key, _ in pairs])}")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


JSON = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)

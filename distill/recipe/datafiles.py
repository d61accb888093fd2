"""The files of data that a recipe names, and their rows; only the standard library is used.

Every value arrives as the file has it: no reader guesses that "None" is missing, that "2021-01-01" is a time or that a
column of digits holds numbers.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from distill.errors import InputError
from distill.recipe.data import Source
from distill.recipe.locate import is_path

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
"""Kinds of data files."""
COMPRESSED: dict[str, Callable[..., TextIO]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Endings that may follow, except after .parquet, which compresses by itself."""
SAVED = ("state.json", "dataset_dict.json")
"""Files that tell a folder of `Dataset.save_to_disk`, or of `DatasetDict.save_to_disk`."""
Row = tuple[int, dict[str, Any]]
"""Line of a file (of a list in JSON: position of the item), and the values of its columns."""
csv.field_size_limit(2**30)


def ending_of(path: Path) -> str:
    """Return the kind of a data file by its ending, compression aside; empty where it is unknown."""
    inner = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    known = inner in ENDINGS and not (inner == ".parquet" and path.suffix in COMPRESSED)
    return inner if known else ""


def is_saved_dataset(path: Path) -> bool:
    """Tell whether a folder was written by `save_to_disk`."""
    return any((path / name).is_file() for name in SAVED)


def data_files(source: str, base: Path) -> list[Path]:
    """List the files that a source names, in the order of their paths; none where it names no file.

    Args:
        source: `./FILE`, a pattern as `./part-*.csv`, or a folder, of which all files of known kinds are taken; a
            folder that `datasets` saved counts as one file.
        base: The folder that relative paths start from.

    Raises:
        InputError: There is no such file, it is empty or of an unknown kind, or there are several kinds.
    """
    if not is_path(source):
        return []
    path = base / Path(source).expanduser()
    if is_saved_dataset(path):
        return [path]
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file() and ending_of(file)]
        if not found:
            raise InputError(f"{path} holds no file that ends in {', '.join(ENDINGS)}")
    else:
        found = [path] if path.is_file() else [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise InputError(f"there is no file {path}")
    kinds = {ending_of(file): file for file in found}
    if "" in kinds:
        raise InputError(
            f"{kinds['']} has none of the known endings {', '.join(ENDINGS)}, which {', '.join(COMPRESSED)} may follow"
        )
    if len(kinds) > 1:
        raise InputError(f"{path} stands for files of several kinds, {', '.join(sorted(kinds))}; name one kind")
    for file in found:
        if file.stat().st_size == 0:
            raise InputError(f"{file} is empty")
    return found


def read_rows(path: Path, source: Source) -> Iterator[Row]:
    """Read a file that is not parquet, row by row, with all of its columns.

    Raises:
        InputError: The file is broken; names it and the line.
    """
    ending, encoding, number = ending_of(path), source.encoding, 0
    if encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
        encoding = "utf-8-sig"  # takes a byte order mark away, where there is one
    try:
        newline = "" if ending in (".csv", ".tsv") else None
        with COMPRESSED.get(path.suffix, open)(path, "rt", encoding=encoding, newline=newline) as file:
            for number, row in READERS[ending](file, source):
                yield number, row
    except LookupError as error:
        raise InputError(f"{path}: {error}") from error
    except UnicodeDecodeError as error:
        fix = "name its encoding, as in {source: ./x.csv, encoding: latin-1}"
        raise InputError(f"{path}: after line {number} it is not {source.encoding} ({error.reason}); {fix}") from error
    except (OSError, EOFError, lzma.LZMAError, csv.Error, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot read it: {error}") from error


def _json_rows(file: TextIO, _source: Source) -> Iterator[Row]:
    """Read one object per line, or one list of objects."""
    start = file.read(1)
    while start.isspace():
        start = file.read(1)
    if start == "[":
        for number, item in enumerate(_parse(start + file.read()), start=1):
            yield number, _checked(item, f"item {number}")
        return
    for number, line in enumerate(file, start=1):
        text = start + line if number == 1 else line
        if text.strip():
            try:
                item = _parse(text)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            yield number, _checked(item, f"line {number}")


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key stands twice among {', '.join(key for key, _ in pairs)}")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _checked(item: Any, place: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ValueError(f"{place} is not an object with columns: {str(item)[:40]}")
    return item


def _csv_rows(delimiter: str, file: TextIO, source: Source) -> Iterator[Row]:
    reader = csv.reader(file, delimiter=source.delimiter or delimiter, strict=True)
    names = next(reader, [])
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise ValueError(f"two columns are called {twice[0]!r}")
    if len(names) == 1 and (other := next((mark for mark in ",;\t|" if mark in names[0]), None)):
        raise ValueError(f"its first line is one column; name the mark between columns, as in {{delimiter: {other!r}}}")
    for values in reader:
        if values and len(values) != len(names):
            raise ValueError(f"line {reader.line_num} has {len(values)} columns, the first line has {len(names)}")
        if values:
            yield reader.line_num, dict(zip(names, values, strict=True))


def _text_rows(file: TextIO, source: Source) -> Iterator[Row]:
    """Read documents: the whole file, or what stands between the separating lines."""
    start = 1
    lines: list[str] = []
    for number, line in enumerate(file, start=1):
        if source.separator is not None and line.rstrip("\n") == source.separator:
            yield start, {"text": "".join(lines)}
            start, lines = number + 1, []
        else:
            lines.append(line)
    yield start, {"text": "".join(lines)}


READERS: dict[str, Callable[[TextIO, Source], Iterator[Row]]] = {
    **dict.fromkeys((".jsonl", ".json"), _json_rows),
    ".csv": partial(_csv_rows, ","),
    ".tsv": partial(_csv_rows, "\t"),
    ".txt": _text_rows,
}

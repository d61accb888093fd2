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
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from io import BufferedReader, RawIOBase, TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from distill.errors import InputError
from distill.files import check_fetched
from distill.recipe.data import Source
from distill.recipe.jsonrows import LONGEST, Row, json_rows, read_lines
from distill.recipe.locate import is_path

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
"""Kinds of data files."""
COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Endings that may follow, except after .parquet, which compresses by itself."""
DENSEST, UNSUSPECTED = 100, 10_000_000
"""A compressed file may unpack to so many times its size, or to so many bytes; of text it is ten times at most."""
SAVED = ("state.json", "dataset_dict.json")
"""Files that tell a folder of `Dataset.save_to_disk`, or of `DatasetDict.save_to_disk`."""
UNREAD = (
    *(".zst", ".zip", ".tar", ".tgz", ".7z", ".arrow", ".feather", ".orc", ".avro", ".xlsx", ".xls", ".xml"),
    *(".pkl", ".npy", ".db", ".sqlite", ".ndjson", ".jsonlines"),
)
"""Endings of data that is not read; in a folder they are refused, while other files are no data."""
BESIDE = re.compile(r"/\.|/__MACOSX/|/(readme|licen[cs]e|notice|changelog|requirements)\.txt$", re.IGNORECASE)
"""Hidden files, copies that an editor or archiver made, and files about data: they lie in a folder beside the data."""
OPTIONS = {
    "delimiter": (".csv", ".tsv"),
    "quotes": (".csv", ".tsv"),
    "encoding": (".jsonl", ".json", ".csv", ".tsv", ".txt"),
    "separator": (".txt",),
}
"""Option of a source -> kinds of files that have it."""
OTHER_CONTENT = {
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "compressed with gzip; let its name end in .gz",
    b"BZh": "compressed with bzip2; let its name end in .bz2",
    b"\xfd7zXZ": "compressed with xz; let its name end in .xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it",
    b"PAR1": "a parquet file; let its name end in .parquet",
    b"\xff\xfe": "UTF-16; write encoding: utf-16 in a section of its own, as in {source: ./x.csv, encoding: utf-16}",
    b"\xfe\xff": "UTF-16; write encoding: utf-16 in a section of its own, as in {source: ./x.csv, encoding: utf-16}",
}
"""First bytes of files that are not what their name says."""
csv.field_size_limit(LONGEST)
QUOTES = "write quotes: true in the section of the source where quotes enclose values, false where they are text"


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
        check_folder(path, found)
        check_splits(path, found)
    else:
        matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
        found = [path] if path.exists() else [file for file in matches if not file.is_dir()]
        if not found:
            raise InputError(f"there is no file {path}")
        check_splits(next(folder for folder in path.parents if not glob.has_magic(str(folder))), found)
    check_kinds(found)
    return found


def searched_paths(source: str, base: Path) -> list[Path]:
    """List what must not hold anything else: the files of a source, and the folder where all files are taken."""
    files = data_files(source, base)
    path = base / Path(source).expanduser()
    start = next((folder for folder in path.parents if "**" not in str(folder)), path) if "**" in source else path
    return [start, *files] if files and start.is_dir() else files


def check_folder(path: Path, files: Collection[Path]) -> None:
    """Refuse a folder with data that would be passed over, or with files that are no data."""
    if unread := [file for file in sorted(path.rglob("*")) if _is_unread(file)]:
        raise InputError(f"{path} holds {unread[0].relative_to(path)}, which cannot be read; convert or move it")
    if beside := [file for file in files if BESIDE.search(f"/{file.relative_to(path)}")]:
        name = beside[0].relative_to(path)
        raise InputError(f"{path} holds {name}, which would be read as data; move it, or list the files that are meant")


def check_splits(path: Path, files: Collection[Path]) -> None:
    """Refuse files named after splits, which would be mixed. Raises InputError."""
    words = {file: set(re.split("[^a-z]+", os.path.relpath(file, path).lower())) for file in files}
    training = [file for file, found in words.items() if "train" in found]
    held_out = [file for file, found in words.items() if found & {"test", "validation", "valid", "dev", "eval"}]
    if training and held_out:
        raise InputError(
            f"{path} holds {os.path.relpath(training[0], path)} and {os.path.relpath(held_out[0], path)}; name the "
            f"files of each split: train: ./FILE, test: ./FILE"
        )


def _is_unread(file: Path) -> bool:
    """Tell a file of data that is not read, also for the case of its letters (B.CSV) or what compresses it."""
    name = Path(file.name.lower())
    inner = Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix
    return not ending_of(file) and inner in (*UNREAD, *ENDINGS)


def check_kinds(files: Collection[Path]) -> None:
    """Refuse files that are empty, no files, of no known kind or of several. Raises InputError."""
    kinds = {ending_of(file): file for file in files}
    if "" in kinds:
        raise InputError(
            f"{kinds['']} has none of the known endings {', '.join(ENDINGS)}, which {', '.join(COMPRESSED)} may follow"
            f"; unpack an archive, give a copy of prose or code the ending .txt"
        )
    if len(kinds) > 1:
        names = ", ".join(file.name for _, file in sorted(kinds.items()))
        raise InputError(f"there are files of several kinds, {names}; name one kind")
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} is no regular file")  # a pipe may never end
        if file.stat().st_size == 0:
            raise InputError(f"{file} is empty")
        check_fetched(file)


def check_options(source: Source, path: Path) -> None:
    """Refuse options that files of this kind do not have. Raises InputError."""
    kind = "saved dataset" if is_saved_dataset(path) else ending_of(path)
    for option in source.changed(*OPTIONS):
        if kind not in OPTIONS[option]:
            raise InputError(f"{path.name}: {option} has no effect on a {kind}; it is for {', '.join(OPTIONS[option])}")
    if source.split is not None and kind != "saved dataset" and not source.source.startswith("hub:"):
        raise InputError(f"{path.name}: split has no effect on a {kind}; name the file of the split")


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
        with (
            COMPRESSED.get(path.suffix, open)(path, "rb") as packed,
            _unpacked(packed, path) as plain,
            TextIOWrapper(plain, encoding=encoding, newline=newline) as file,
        ):
            for number, row in READERS[ending](file, source):
                yield number, row
    except LookupError as error:
        raise InputError(f"{path}: {error}") from error
    except UnicodeDecodeError as error:
        other = _other_content(path)
        fix = "name its encoding, as in {source: ./x.csv, encoding: cp1252}"
        why = f"it is {other}" if other else f"after line {number} it is not {source.encoding} ({error.reason}); {fix}"
        raise InputError(f"{path}: {why}") from error
    except (OSError, EOFError, lzma.LZMAError, csv.Error, ValueError, RecursionError) as error:
        other = _other_content(path)
        why = f"it is {other}" if other else str(getattr(error, "strerror", None) or error)
        raise InputError(f"{path}: cannot read it: {why}") from error


def _unpacked(packed: Any, path: Path) -> BinaryIO:
    """Read what a file holds, and stop where a compressed one of that size holds more than any text."""
    if path.suffix not in COMPRESSED:
        return packed  # type: ignore[no-any-return]
    most = max(UNSUSPECTED, DENSEST * path.stat().st_size)

    class Limited(RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            count: int = packed.readinto(buffer)
            if packed.tell() > most:
                raise ValueError(
                    f"it unpacks to more than {most:,} bytes, as nothing but a trap does; unpack it yourself"
                )
            return count

    return BufferedReader(Limited())


def _other_content(path: Path) -> str:
    """Say what a file is by its first bytes, where these are not those of its name."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError:
        return ""
    found = (what for mark, what in OTHER_CONTENT.items() if start.startswith(mark) and path.suffix not in COMPRESSED)
    return next(found, "")


def _csv_rows(delimiter: str, file: TextIO, source: Source) -> Iterator[Row]:
    """Read rows under a line of names. Text in quotes may hold delimiters and, in .csv files, line breaks."""
    delimiter, lines = source.delimiter or delimiter, read_lines(file)
    quoting = csv.QUOTE_NONE if source.quotes is False else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter=delimiter, strict=True, quoting=quoting)  # type: ignore[arg-type]
    names = _checked_names(next(reader, []))
    while True:
        start = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"line {start}: {error}; {QUOTES}") from error
        if values is None:
            return
        if source.quotes is None and delimiter == "\t" and reader.line_num > start:
            raise ValueError(f"line {start}: a quote opens there and closes in line {reader.line_num}; {QUOTES}")
        if not values and len(names) == 1:
            values = [""]
        if values and len(values) != len(names):
            raise ValueError(f"line {start} has {len(values)} columns, the first line has {len(names)}")
        if values == names and len(names) > 1:
            raise ValueError(f"line {start} repeats the names of the columns; remove it, or name the parts as files")
        if values:
            yield start, dict(zip(names, values, strict=True))


def _checked_names(names: list[str]) -> list[str]:
    """Refuse names of columns that stand twice, or that another mark divides. Raises ValueError."""
    if twice := [name for name, count in Counter(names).items() if name and count > 1]:
        raise ValueError(f"two columns are called {twice[0]!r}")
    if len(names) == 1 and (other := next((mark for mark in ",;\t|" if mark in names[0]), None)):
        raise ValueError(f"its first line is one column; name the mark, as in {{delimiter: {json.dumps(other)}}}")
    return names


def _text_rows(file: TextIO, source: Source) -> Iterator[Row]:
    """Read documents: the whole file, or what stands between the separating lines."""
    start = 1
    lines: list[str] = []
    for number, line in enumerate(read_lines(file), start=1):
        if source.separator is not None and line.rstrip("\n") == source.separator:
            yield start, {"text": "".join(lines)}
            start, lines = number + 1, []
        else:
            lines.append(line)
    yield start, {"text": "".join(lines)}


READERS: dict[str, Callable[[TextIO, Source], Iterator[Row]]] = {
    **dict.fromkeys((".jsonl", ".json"), json_rows),
    ".csv": partial(_csv_rows, ","),
    ".tsv": partial(_csv_rows, "\t"),
    ".txt": _text_rows,
}

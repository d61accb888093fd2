"""Checks of the first bytes of the files that a recipe names: no torch, nothing loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.files import MAX_JSON, read_object
from distill.recipe.data import SPLITS
from distill.recipe.datafiles import check_options, data_files, ending_of, is_saved_dataset, read_rows
from distill.recipe.fields import KeyPath, Mistake
from distill.recipe.jsonrows import list_names
from distill.recipe.locate import (
    TeacherSize,
    ambiguous_folder,
    is_left_behind,
    teacher_folder,
    teacher_size,
)
from distill.recipe.names import OPTIONAL_COLUMNS, SOURCE_COLUMNS, TASK_COLUMNS
from distill.recipe.schema import Data, Source, Teacher
from distill.registry import suggest

MAX_ROWS = 20_000
"""Rows of a file that are read in search of a column; what comes later is seen when the data is read."""
PARQUET = b"PAR1"
"""First and last bytes of a parquet file."""
NOT_STORED = (
    *("classifier", "score", "lm_head", "pre_classifier", "classifier.dense", "classifier.out_proj", "pooler.dense"),
    *("head.dense", "head.norm", "encoder.embed_positions", "decoder.embed_positions"),
)
"""Modules that a model may have although its file does not: they are made anew, tied or computed."""


def look_at_teacher(teacher: Teacher | None, base: Path) -> tuple[TeacherSize, list[Mistake]]:
    """Return size and parameter names of the teacher, as far as its files tell, and what is wrong with them."""
    path: KeyPath = ("teacher", "model")
    size, mistakes = TeacherSize(), []
    if teacher is None or is_left_behind(teacher.model, base):
        return size, []
    try:
        folder = teacher_folder(teacher.model, base)
        if folder is not None:
            size = teacher_size(folder, () if teacher.init == "random" else parameter_names(folder))
    except InputError as error:
        message, _, package = str(error).partition(": pip install ")
        mistakes.append(Mistake(path, message, f"pip install {package}" if package else ""))
    if same := ambiguous_folder(teacher.model, base):
        message = f"ambiguous: {teacher.model} is a folder here and could be a hub id"
        mistakes.append(Mistake(path, message, f"write {same}"))
    return size, mistakes


def parameter_names(folder: Path) -> Collection[str]:
    """List the tensors in a folder's safetensors files, and the names that they may have in a model.

    Empty where the files say nothing: other formats, and experts, which are stored one by one and computed together.

    Raises:
        InputError: A file is missing, broken, cut off or has a header that no model needs.
    """
    files, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if not files[0].exists() and index.exists():
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(Path(str(name)).name == name for name in shards.values()):
            raise InputError(f"{index} has no weight_map of files in its folder")
        files = [folder / name for name in sorted(set(shards.values()))]
    elif not files[0].exists():
        return ()
    names = {name for file in files for name in read_header(file)}
    if any(".experts." in name for name in names):
        return ()
    # Older files have other names for the parameters of a norm.
    names |= {re.sub("gamma$", "weight", re.sub("beta$", "bias", name)) for name in names}
    return sorted(names) + [f"{head}.{kind}" for head in NOT_STORED for kind in ("weight", "bias")]


def read_header(path: Path) -> dict[str, Any]:
    """Read name -> dtype, shape and place of a safetensors file's tensors. Raises InputError when it is not whole."""
    try:
        if not path.is_file():
            raise InputError(f"{path} is not a file")
        have = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if have < 8 or length > min(have - 8, MAX_JSON):
                asked = f"asks for a header of {length:,} bytes and has {have:,}" if have >= 8 else "is empty"
                raise InputError(f"{path} {asked}: it is broken or was not copied whole")
            header = json.loads(file.read(length))
        tensors = {name: info for name, info in header.items() if name != "__metadata__"}
        ends = [int(info["data_offsets"][1]) for info in tensors.values()]
    except (OSError, ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: its header is not that of a safetensors file ({error})") from error
    if max(ends, default=0) + 8 + length > have:
        raise InputError(f"{path} has {have:,} bytes of {max(ends) + 8 + length:,}: it was not copied whole")
    return tensors


def look_at_data(data: Data | None, base: Path) -> Iterator[Mistake]:
    """Yield what is wrong with the data files: they are not there, of no known kind, or lack a column."""
    if data is None:
        return
    roles = TASK_COLUMNS.get(data.task, ())  # type: ignore[call-overload]
    needed = [role for role in roles if role not in OPTIONAL_COLUMNS or role in data.columns]
    wanted = {role: data.columns.get(role, role) for role in needed}
    for split in SPLITS:
        key = data.key_of(split)
        for source in data.origins(split):
            if is_left_behind(source.source, base):
                continue
            if columns := SOURCE_COLUMNS.get(source.source):  # type: ignore[call-overload]
                yield from _lacking(key, source.source, columns, wanted)
            try:
                for path in data_files(source.source, base):
                    check_options(source, path)
                    columns = first_columns(path, source, set(wanted.values()))
                    if lacking := [] if columns is None else [*_lacking(key, path.name, columns, wanted)]:
                        yield from lacking
                        break  # other files of the source are hardly different
            except InputError as error:
                yield Mistake(("data", key), str(error))


def first_columns(path: Path, source: Source, wanted: set[str]) -> Collection[str] | None:
    """Return the columns of a file's first rows; None where it takes more than the standard library to tell.

    Raises:
        InputError: The file is broken, or has no row.
    """
    if is_saved_dataset(path):
        return None
    if ending_of(path) == ".parquet":
        check_parquet(path)
        return None
    columns: dict[str, None] = {}
    for _, row in islice(read_rows(path, source), MAX_ROWS):
        columns |= dict.fromkeys(row)
        if ending_of(path) in (".csv", ".tsv", ".txt") or columns.keys() >= wanted:
            return columns
    if not columns:
        raise InputError(f"{path} has no row")
    return columns


def check_parquet(path: Path) -> None:
    """Refuse a file that does not begin and end as parquet does. Raises InputError."""
    try:
        with path.open("rb") as file:
            start, end = file.read(4), file.seek(-4, 2) and file.read(4)
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from error
    if start != PARQUET or end != PARQUET:
        raise InputError(f"{path} is {'cut off' if start == PARQUET else 'not a parquet file'}")


def _lacking(key: str, name: str, columns: Collection[str], wanted: dict[str, str]) -> Iterator[Mistake]:
    """Yield the columns that a file or a corpus does not have."""
    for role, column in wanted.items():
        if column not in columns:
            message = f"{name} has no column {column!r}; it has {list_names(columns)}"
            fix = f"{suggest(column, columns)}Name it: columns: {{{role}: COLUMN}}"
            yield Mistake(("data", "columns", role) if role != column else ("data", key), message, fix)

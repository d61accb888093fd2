"""Checks of the first bytes of the files that a recipe names: no torch, nothing loaded."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.files import MAX_JSON, read_object
from distill.recipe.fields import KeyPath, Mistake
from distill.recipe.gguf import gguf_size
from distill.recipe.locate import (
    TeacherSize,
    ambiguous_folder,
    data_file,
    is_gguf,
    is_left_behind,
    teacher_folder,
    teacher_size,
)
from distill.recipe.schema import Data, Teacher

MAX_LINE = 1_000_000
MAX_LINES = 100_000
"""Bytes of a line, and lines, that are read in search of a column; what comes later is seen when the data is read."""
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
        if folder is not None and is_gguf(folder):
            size = gguf_size(folder)
        elif folder is not None:
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
    """Yield what is wrong with the data file: it is not there, of no known kind, or lacks a column."""
    if data is None or is_left_behind(data.source, base):
        return
    try:
        path = data_file(data.source, base)
        if path is None:
            return
        wanted = {} if path.suffix == ".txt" else {"text": data.text}
        wanted |= {"label": data.label} if data.task == "classification" else {}
        columns = _columns(path, set(wanted.values()))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        known = str(error).removeprefix("data.source: ")
        yield Mistake(("data", "source"), known if isinstance(error, InputError) else f"cannot read the file: {error}")
        return
    for key, column in wanted.items():
        if columns is not None and column not in columns:
            yield Mistake(("data", key), f"{path.name} has no column {column!r}; it has {', '.join(columns)}")


def _columns(path: Path, wanted: set[str]) -> list[str] | None:
    """List the columns of a file, at least until all that are wanted are found; None where that would take long."""
    if path.suffix == ".txt":
        return ["text"]
    if path.suffix == ".parquet":
        with path.open("rb") as file:
            if file.read(4) != b"PAR1":
                raise ValueError("it is not a parquet file")
        return None
    columns: dict[str, None] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            return next(csv.reader(iter(lambda: file.readline(MAX_LINE), "")), [])
        for number in range(1, MAX_LINES + 1):
            line = file.readline(MAX_LINE)
            if len(line) == MAX_LINE or (number == 1 and line.lstrip().startswith("[")):
                return None
            if not line:
                break
            row = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not an object: {line[:40].strip()}")
            columns |= dict.fromkeys(row)
            if wanted <= columns.keys():
                break
        else:
            return None
    return list(columns)

"""Checks of the first bytes of the files that a recipe names: no torch, nothing loaded."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from distill.errors import InputError
from distill.files import read_object
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
from distill.recipe.weights import check_tensors, parameter_names, read_headers

MAX_LINE = 1_000_000
MAX_LINES = 100_000
"""Bytes of a line, and lines, that are read in search of a column; what comes later is seen when the data is read."""
MAX_TOKENIZER = 20_000_000
"""Bytes of a tokenizer.json that is read to check a recipe."""


def look_at_teacher(teacher: Teacher | None, base: Path) -> tuple[TeacherSize, list[Mistake]]:
    """Return size and parameter names of the teacher, as far as its files tell, and what is wrong with them."""
    path: KeyPath = ("teacher", "model")
    size, mistakes = TeacherSize(), []
    if teacher is None or is_left_behind(teacher.model, base):
        return size, []
    try:
        folder = teacher_folder(teacher.model, base)
        if folder is not None:
            size, found = look_at_folder(folder, weights=teacher.init != "random")
            mistakes += [Mistake(path, message) for message in found]
    except InputError as error:
        message, _, package = str(error).partition(": pip install ")
        mistakes.append(Mistake(path, message, f"pip install {package}" if package else ""))
    if same := ambiguous_folder(teacher.model, base):
        message = f"ambiguous: {teacher.model} is a folder here and could be a hub id"
        mistakes.append(Mistake(path, message, f"write {same}"))
    return size, mistakes


def look_at_folder(folder: Path, *, weights: bool) -> tuple[TeacherSize, list[str]]:
    """Return what config and headers of a model folder, or of a GGUF file, tell, and what is wrong with them.

    Raises:
        InputError: They cannot be read, or are those of no model that can be cut.
    """
    if is_gguf(folder):
        return gguf_size(folder), []
    if not weights:
        return teacher_size(folder), list(_check_vocabulary(folder, teacher_size(folder)))
    tensors = read_headers(folder)
    size = teacher_size(folder)
    mistakes = [*check_tensors(folder, tensors, size), *_check_vocabulary(folder, size)]
    return replace(size, tensors=parameter_names(tensors)), mistakes


def _check_vocabulary(folder: Path, size: TeacherSize) -> Iterator[str]:
    """Yield that the words of a tokenizer are more than the embeddings; tokens that were added may go unused."""
    path = folder / "tokenizer.json"
    if size.vocabulary is None or not path.is_file() or path.stat().st_size > MAX_TOKENIZER:
        return
    model = read_object(path).get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    ids = words.values() if isinstance(words, dict) else range(len(words)) if isinstance(words, list) else ()
    highest = max((number for number in ids if type(number) is int), default=-1)
    if highest >= size.vocabulary:
        yield (
            f"{folder}: tokenizer.json has words up to id {highest:,}, and config.json says vocab_size "
            f"{size.vocabulary:,}; the two do not belong together"
        )


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

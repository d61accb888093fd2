"""Checks of the first bytes of the files that a recipe names: no torch, nothing loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.files import read_object
from distill.recipe.datafiles import check_options, data_files, ending_of, is_saved_dataset, read_rows
from distill.recipe.fields import KeyPath, Mistake
from distill.recipe.gguf import gguf_size
from distill.recipe.jsonrows import quote_names
from distill.recipe.locate import (
    TeacherSize,
    ambiguous_folder,
    is_gguf,
    is_left_behind,
    teacher_folder,
    teacher_size,
)
from distill.recipe.names import OFFERED_COLUMNS, SOURCE_COLUMNS, TASK_COLUMNS, columns_read
from distill.recipe.schema import Data, Evaluation, Source, Teacher, with_sets
from distill.recipe.task_rules import reader_fits
from distill.recipe.weights import check_tensors, parameter_names, read_headers
from distill.registry import suggest

MAX_ROWS = 20_000
"""Rows of a file that are read in search of a column; what comes later is seen when the data is read."""
PARQUET = b"PAR1"
"""First and last bytes of a parquet file."""
MAX_TOKENIZER = 20_000_000
"""Bytes of a tokenizer.json that is read to check a recipe."""


def look_at_models(
    parts: Mapping[str, Any], base: Path, *, weights: bool = True
) -> tuple[TeacherSize, TeacherSize | None, list[Mistake]]:
    """Return the sizes of the first teacher and of a given student, and what is wrong with the files of all models."""
    named: list[tuple[KeyPath, Teacher | None]]
    named = [(("teachers", number, "model"), one) for number, one in enumerate(parts.get("teachers") or ())]
    named = named or [(("teacher", "model"), parts.get("teacher"))]
    if parts.get("given"):
        named.append((("student", "from"), Teacher(model=parts["given"])))
    looked = [look_at_teacher(model, base, path, weights=weights) for path, model in named]
    (size, mistakes), *others = looked
    for (path, _), (own, found) in zip(named[1:], others, strict=True):
        mistakes += found or (reader_fits(parts["data"], size, own, path) if "data" in parts else ())
    return size, others[-1][0] if parts.get("given") else None, mistakes


def look_at_teacher(
    teacher: Teacher | None, base: Path, path: KeyPath = ("teacher", "model"), *, weights: bool = True
) -> tuple[TeacherSize, list[Mistake]]:
    """Return size and parameter names of the teacher, as far as its files tell, and what is wrong with them.

    Without `weights` there need not be any.
    """
    size, mistakes = TeacherSize(), []
    if teacher is None or is_left_behind(teacher.model, base):
        return size, []
    try:
        folder = teacher_folder(teacher.model, base)
        if folder is not None:
            size, found = look_at_folder(folder, weights=weights and teacher.init != "random")
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
    if (folder / "generation_config.json").is_file():
        read_object(folder / "generation_config.json")  # transformers passes over a broken one
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


def look_at_data(data: Data | None, base: Path, evaluation: Evaluation | None = None) -> Iterator[Mistake]:
    """Yield what is wrong with the data files: they are not there, of no known kind, or lack a column."""
    if data is None:
        return
    needed = columns_read(data.task, TASK_COLUMNS.get(data.task, ()), data.columns)  # type: ignore[call-overload]
    sure = [role for role in needed if role not in OFFERED_COLUMNS or role in data.columns]
    wanted = {role: data.columns.get(role, role) for role in sure}
    rows = with_sets(data, evaluation)
    for split in rows.splits:
        key = rows.path_of(split)
        for source in rows.origins(split):
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
                yield Mistake(key, str(error))


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
    columns: dict[str, Any] = {}
    for _, row in islice(read_rows(path, source), MAX_ROWS):
        columns |= row
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


def _nested(row: Mapping[str, Any], wanted: Collection[str]) -> str:
    """Find the lists of objects that hold the columns, each within the one before, as SQuAD's files have them."""
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            inner = _nested(value[0], wanted)
            if inner or value[0].keys() & {*wanted}:
                return f".{name}[]{inner}"
    return ""


def _lacking(key: KeyPath, name: str, columns: Collection[str], wanted: dict[str, str]) -> Iterator[Mistake]:
    """Yield the columns that a file or a corpus does not have."""
    if (
        isinstance(columns, dict)
        and not columns.keys() & {*wanted.values()}
        and (where := _nested(columns, wanted.values()))
    ):
        yield Mistake(
            key,
            f"{name} has its rows within {where}",
            f"Write a file of rows, one object with {', '.join(wanted.values())} on each line",
        )
        return
    for role, column in wanted.items():
        if column not in columns:
            message = f"{name} has no column {column!r}; it has {quote_names(columns)}"
            fix = f"{suggest(column, columns)}Name it: columns: {{{role}: COLUMN}}"
            if [*columns] == ["text"] and ".txt" in Path(name).suffixes:
                fix = "A .txt file is prose and nothing else; write rows with columns as .jsonl, .csv or .parquet"
            yield Mistake(("data", "columns", role) if role != column else key, message, fix)

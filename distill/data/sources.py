"""Sources of rows: built-in corpora, files, saved and hub datasets, and the user's own function."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import reprlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from distill.data.builtin import SOURCES, library_fingerprint
from distill.errors import InputError
from distill.files import content_of, is_plain_name, read_object
from distill.models.weights import as_input_error
from distill.recipe.datafiles import (
    SAVED,
    check_kinds,
    check_options,
    data_files,
    ending_of,
    is_saved_dataset,
    read_rows,
)
from distill.recipe.jsonrows import quote_names
from distill.recipe.schema import Source
from distill.recipe.weights import is_inside
from distill.registry import find

Row = dict[str, Any]
ClassNames = dict[str, list[str]]
"""Column -> names of the classes that it gives by their numbers."""
NUMBER = re.compile(r"-?\d{1,9}", re.ASCII)
BLOCK = 1000
"""Rows that are read at once."""


def source_fingerprint(source: Source, split: str, base: Path, paths: Collection[str] = ()) -> str:
    """Return a sha256 of what a source is made from, without reading rows from it where that can be.

    Of files their content decides, never their time; hub datasets are files. Of those that rows name in the columns
    `paths`, of which there may be any number, it is path, size and the kernel's own time. A built-in corpus follows
    from the Python version and the content of its standard library. What the user's own function reads is not known,
    so it is called, and its rows are hashed.
    """
    files, names = find_files(source, split, base)
    if files:
        digest = hashlib.sha256(json.dumps([[*map(content_of, files)], names]).encode())
        for _, row in read_source(source, split, paths, base, paths, paths) if paths else ():
            digest.update(json.dumps([_signature(row.get(name)) for name in sorted(paths)]).encode())
        return digest.hexdigest()
    if source.source in SOURCES:
        return library_fingerprint()
    digest = hashlib.sha256()
    for row in _call(source.source):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _call(name: str) -> Any:
    """Call a built-in corpus or the user's own function for its rows. Raises InputError where it gives none."""
    rows = find(SOURCES, name, "data source")()
    if not isinstance(rows, Iterable):
        raise InputError(f"data source {name!r} returns {reprlib.repr(rows)}, which are no rows")
    return rows


def _signature(path: Any) -> Any:
    try:
        stat = os.stat(path)
        return [path, stat.st_size, stat.st_ctime_ns]  # which `os.utime` cannot set
    except (OSError, ValueError, TypeError):  # said with its line when the row is read
        return str(path)


def find_files(source: Source, split: str, base: Path) -> tuple[list[Path], ClassNames]:
    """List the files of a source, and the classes that a hub dataset numbers; of other kinds of sources there are none.

    Raises:
        InputError: They are not there, or are no data files.
    """
    if source.source.startswith("hub:"):
        return _hub_files(source, split)
    files = data_files(source.source, base)
    for path in files:
        check_options(source, path)
    return files, {}


def read_source(
    source: Source,
    split: str,
    columns: Collection[str],
    base: Path,
    optional: Collection[str] = (),
    paths: Collection[str] = (),
) -> Iterator[tuple[str, Row]]:
    """Read a source row by row.

    Args:
        source: As the recipe names it.
        split: The split of a dataset that has several, unless the source names one.
        columns: Columns that are read; others may be left out.
        base: The folder that relative paths start from.
        optional: Those of them that a source need not have.
        paths: Columns whose values are paths, which start from the folder of the data file, or from `base` where there
            is none; they come as whole paths.

    Yields:
        Where a row comes from, in words, and its values by column.

    Raises:
        InputError: The source is broken, or one of its files lacks a column; names file and line.
    """
    files, names = find_files(source, split, base)
    needed, count = {*columns} - {*optional}, 0
    for path in files:
        place, unit = str(path.relative_to(base) if path.is_relative_to(base) else path), "row"
        if is_saved_dataset(path):
            rows, own = _dataset_rows(_saved_dataset(path, source.split or split), columns, needed, place)
        elif ending_of(path) == ".parquet":
            rows, own = _parquet_rows(path, columns, needed, place)
        else:
            rows, own, unit = read_rows(path, source), {}, "line"
        for each in _with_paths(_checked(rows, place, unit, names or own, needed), path.parent, paths):
            count += 1
            yield each
    if source.separator is not None and count == len(files):
        raise InputError(f"{source.source}: no line is the separator {source.separator!r} alone, so remove or mend it")
    if not files:
        name = source.source
        rows, own = _dataset_rows(_call(name), columns, needed, name)
        yield from _with_paths(_checked(rows, name, "row", own, needed), base, paths)


def _with_paths(rows: Iterator[tuple[str, Row]], folder: Path, paths: Collection[str]) -> Iterator[tuple[str, Row]]:
    for place, row in rows:
        for name in paths:
            if isinstance(row.get(name), str) and row[name]:
                row[name] = str(folder / row[name])
        yield place, row


def _checked(
    rows: Iterable[tuple[int, Row]], name: str, unit: str, classes: ClassNames, columns: Collection[str]
) -> Iterator[tuple[str, Row]]:
    """Give rows their place and the names of their classes; refuse a file that has none, or lacks a column."""
    lacking, row = set(columns), None
    for number, row in rows:
        place = f"{name}, {unit} {number}"
        if not isinstance(row, dict):
            raise InputError(f"{place} is no row with columns: {reprlib.repr(row)}")
        if lacking:
            lacking -= row.keys()
        for column in classes.keys() & row.keys():
            row[column] = _class_of(row[column], classes[column], f"{place}: column {column!r}")
        yield place, row
    if row is None:
        raise InputError(f"{name} has no row")
    check_columns(lacking, row, name)


def check_columns(wanted: Collection[str], names: Collection[str], place: str) -> None:
    """Refuse a source without one of the columns. Raises InputError."""
    if lacking := [column for column in wanted if column not in names]:
        raise InputError(f"{place} has no column {lacking[0]!r}; it has {quote_names(names)}")


def _class_of(value: Any, names: Sequence[str], place: str) -> Any:
    """Return the name of a class that is given by its number, or of several; -1 stands for none."""
    if isinstance(value, list):
        return [_class_of(each, names, place) for each in value]
    if value is None or value in names:
        return value
    number = int(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value
    if type(number) is not int or not -1 <= number < len(names):
        raise InputError(
            f"{place} is {value!r}, and the dataset has the classes 0 to {len(names) - 1}, {quote_names(names)}"
        )
    return None if number == -1 else names[number]


def _class_names(features: Any) -> ClassNames:
    """Find the classes that columns number, in the features of a dataset as JSON; a stranger may have written them."""
    found = {}
    for column, kind in features.items() if isinstance(features, dict) else ():
        inner = kind.get("feature", kind) if isinstance(kind, dict) else None
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" and isinstance(inner.get("names"), list):
            found[column] = [str(name) for name in inner["names"]]
    return found


def _dataset_rows(
    rows: Any, columns: Collection[str], needed: Collection[str], place: str
) -> tuple[Iterable[tuple[int, Row]], ClassNames]:
    """Read the rows of a `datasets.Dataset`, or of any iterable of rows, and the classes that it numbers."""
    import datasets

    if isinstance(rows, datasets.DatasetDict):
        raise InputError(f"{place} returns the splits {', '.join(rows)}; let it return one of them")
    if not isinstance(rows, datasets.Dataset):
        return enumerate(rows, start=1), {}
    check_columns(needed, rows.column_names, place)
    chosen = rows.select_columns(sorted({*columns} & {*rows.column_names}))
    tables = chosen.with_format("arrow")  # as stored: pictures and sounds stay closed
    return _table_rows(tables.iter(BLOCK), place), _class_names(rows.features.to_dict())


def _parquet_rows(
    path: Path, columns: Collection[str], needed: Collection[str], place: str
) -> tuple[Iterable[tuple[int, Row]], ClassNames]:
    """Read the needed columns of a parquet file as plain values; its metadata may name classes, and nothing else."""
    from pyarrow import parquet

    with as_input_error(f"{path}: cannot read it"):
        file = parquet.ParquetFile(path)
        metadata = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        classes = _class_names(metadata["info"]["features"] if metadata else {})
    check_columns(needed, file.schema_arrow.names, place)
    wanted = sorted({*columns} & {*file.schema_arrow.names})
    return _table_rows(file.iter_batches(BLOCK, columns=wanted), str(path)), classes


def _table_rows(tables: Iterable[Any], place: str) -> Iterator[tuple[int, Row]]:
    """Read the rows of Arrow tables, as plain values."""
    number = 0
    with as_input_error(f"{place}: cannot read it"):
        for table in tables:
            for row in table.to_pylist():
                number += 1
                yield number, row


def _saved_dataset(path: Path, split: str) -> Any:
    import datasets

    with as_input_error(f"{path} is no folder that `datasets` saved"):
        _check_saved(path)
        found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        return found[_one_of(found, split, str(path))]
    return found


def _check_saved(path: Path) -> None:
    """Refuse a saved dataset that names files of other folders: they would be read, and no fingerprint covers them."""
    names = read_object(path / SAVED[1])["splits"] if (path / SAVED[1]).is_file() else []
    for state in [path / SAVED[0], *(path / str(name) / SAVED[0] for name in names)]:
        listed = read_object(state) if state.is_file() else {}
        names += [
            each["filename"] for key, files in listed.items() if key.endswith("data_files") for each in files or ()
        ]
    if odd := [name for name in names if not is_plain_name(name)]:
        raise InputError(f"{path} names {odd[0]!r}, which does not lie in the folder itself")


def _one_of(splits: Collection[str], split: str, place: str) -> str:
    if split not in splits:
        raise InputError(f"{place} has the splits {', '.join(splits)}, not {split}; name one, as in {{split: …}}")
    return split


def list_splits(source: Source, base: Path) -> list[str]:
    """List the splits of a saved or hub dataset that has several; none of other sources."""
    if source.source.startswith("hub:"):
        return [*map(str, _hub_dataset(source)[1].config.data_files or {})]
    folders = [path / SAVED[1] for path in data_files(source.source, base) if is_saved_dataset(path)]
    return [str(name) for file in folders if file.is_file() for name in read_object(file)["splits"]]


def _hub_files(source: Source, split: str) -> tuple[list[Path], ClassNames]:
    """List the files of one split of a hub dataset."""
    folder, builder = _hub_dataset(source)
    splits = builder.config.data_files or {}
    files = [Path(file) for file in splits[_one_of([*map(str, splits)], source.split or split, source.source)]]
    if odd := [file for file in files if not is_inside(folder, file)]:
        raise InputError(f"{source.source}: {odd[0]} is no file of the dataset")
    check_kinds(files)
    return files, _class_names(builder.info.features.to_dict() if builder.info.features else {})


@lru_cache
def _hub_dataset(source: Source) -> tuple[Path, Any]:
    """Find the folder of a hub dataset, downloaded unless offline, and its splits; no code of it is run."""
    import datasets
    from huggingface_hub import constants, snapshot_download

    name, wanted = source.source.removeprefix("hub:"), None
    if os.path.exists(name):
        raise InputError(f"{source.source}: there is a folder {name} here, which would be taken for it; use ./{name}")
    with as_input_error(f"{source.source}: cannot get it from the hub"):
        if not constants.HF_HUB_OFFLINE:
            remote = datasets.load_dataset_builder(name, source.config, revision=source.revision)
            urls = [str(url) for urls in (remote.config.data_files or {}).values() for url in urls]
            wanted = ["README.md", *(glob.escape(url.partition("@")[2].partition("/")[2]) for url in urls)]
        folder = snapshot_download(name, repo_type="dataset", revision=source.revision, allow_patterns=wanted)
        return Path(folder), datasets.load_dataset_builder(folder, source.config)

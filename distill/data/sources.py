"""Sources of rows: built-in corpora that every Python brings along, files, saved and hub datasets, the user's function.

A built-in corpus is a `datasets.Dataset` with the columns `text` (str) and `label` (str, or None where unlabelled).
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.files import content_of
from distill.models.weights import as_input_error
from distill.recipe.datafiles import data_files, ending_of, is_saved_dataset, read_rows
from distill.recipe.schema import Source
from distill.registry import find

NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
"""Folders of the standard library that are tests, applications or not the library at all."""

Row = dict[str, Any]


def stdlib_docstrings(*, packages: int = 12, shortest: int = 20) -> Any:
    """Read the first paragraphs of the standard library's docstrings, labelled with the package they document.

    The text differs a little between Python versions; the corpus fingerprint in every result says which one it was.

    Args:
        packages: How many packages, those with the most paragraphs.
        shortest: Paragraphs with fewer characters are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    package_of: dict[str, str] = {}  # keyed by text, which removes duplicates; the first package in path order wins
    for path in _library_files(root):
        parts = path.relative_to(root).parts
        for text in _first_paragraphs(path) if len(parts) > 1 else ():
            if len(text) >= shortest:
                package_of.setdefault(text, parts[0])
    largest = [name for name, _ in Counter(package_of.values()).most_common(packages)]
    rows = [(text, package) for text, package in package_of.items() if package in largest]
    return _dataset([text for text, _ in rows], [package for _, package in rows])


def _first_paragraphs(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # the standard library ships deliberately broken files
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return [" ".join(text.split("\n\n")[0].split()) for text in docstrings if text]


def pydoc_topics() -> Any:
    """Read English prose: the topics of Python's own help (`pydoc_data.topics`), one text per topic, unlabelled."""
    from pydoc_data.topics import topics

    texts = [str(text) for _, text in sorted(topics.items())]
    return _dataset(texts, [None] * len(texts))


def stdlib_sources(*, largest: int = 200_000) -> Any:
    """Read Python code: the files of the installed standard library, tests left out, one text per file, unlabelled.

    The text differs a little between Python versions; the corpus fingerprint in every result says which one it was.

    Args:
        largest: Files with more bytes, which are tables of data, are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(encoding="utf-8") for path in _library_files(root) if 0 < path.stat().st_size <= largest]
    return _dataset(texts, [None] * len(texts))


def source_fingerprint(source: Source, base: Path, files: Collection[str] = ()) -> str:
    """Return a sha256 of what a source is made from, without reading rows from it where that can be.

    Of a file its content decides, never its time; of those that rows name in the columns `files`, of which there may be
    any number, it is path, size and time, as they are read anew where these change. A built-in corpus follows from the
    Python version and the content of its standard library, a hub dataset from its commit. What the user's own function
    reads is not known, so it is called, and its rows are hashed.
    """
    if found := data_files(source.source, base):
        digest = hashlib.sha256("".join(map(content_of, found)).encode())
        for _, row in read_source(source, "train", files, base, files) if files else ():
            digest.update(json.dumps([_signature(row.get(name)) for name in sorted(files)]).encode())
        return digest.hexdigest()
    if source.source.startswith("hub:"):
        return str(_hub_builder(source).hash)
    if source.source in SOURCES:
        return _library_fingerprint()
    rows = list(find(SOURCES, source.source, "data source")())
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def _signature(path: Any) -> Any:
    try:
        stat = os.stat(path)
        return [path, stat.st_size, stat.st_mtime_ns]
    except (OSError, ValueError, TypeError):  # said with its line when the row is read
        return str(path)


@lru_cache(maxsize=1)
def _library_fingerprint() -> str:
    root, digest = Path(sysconfig.get_paths()["stdlib"]), hashlib.sha256(sys.version.encode())
    for path in _library_files(root):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def _library_files(root: Path) -> list[Path]:
    """List the modules of the standard library, in the order of their paths."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_LIBRARY]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def read_source(
    source: Source, split: str, columns: Collection[str], base: Path, files: Collection[str] = ()
) -> Iterator[tuple[str, Row]]:
    """Read a source row by row.

    Args:
        source: As the recipe names it.
        split: The split of a dataset that has several, unless the source names one.
        columns: Columns that are needed; others may be left out.
        base: The folder that relative paths start from.
        files: Columns whose values are paths, which start from the folder of the data file, or from `base` where there
            is none; they come as whole paths.

    Yields:
        Where a row comes from, in words, and its values by column.

    Raises:
        InputError: The source is broken; names file and line.
    """
    found = data_files(source.source, base)
    for path in found:
        yield from _with_paths(_file_rows(path, source, split, columns), path.parent, files)
    if not found:
        yield from _with_paths(_other_rows(source, split, columns), base, files)


def _with_paths(rows: Iterator[tuple[str, Row]], folder: Path, files: Collection[str]) -> Iterator[tuple[str, Row]]:
    for place, row in rows:
        for name in files:
            if isinstance(row.get(name), str) and row[name]:
                row[name] = str(folder / row[name])
        yield place, row


def _file_rows(path: Path, source: Source, split: str, columns: Collection[str]) -> Iterator[tuple[str, Row]]:
    if is_saved_dataset(path):
        yield from _dataset_rows(_saved_dataset(path, source.split or split), path.name, columns)
    elif ending_of(path) == ".parquet":
        yield from ((f"{path.name}, row {number}", row) for number, row in _parquet_rows(path, columns))
    else:
        yield from ((f"{path.name}, line {number}", row) for number, row in read_rows(path, source))


def _other_rows(source: Source, split: str, columns: Collection[str]) -> Iterator[tuple[str, Row]]:
    """Read a hub dataset, a built-in corpus or what the user's own function gives."""
    if source.source.startswith("hub:"):
        with as_input_error(f"{source.source}: cannot get it from the hub"):
            rows = _hub_builder(source, download=True).as_dataset(split=source.split or split)
        yield from _dataset_rows(rows, source.source, columns)
    else:
        yield from _dataset_rows(find(SOURCES, source.source, "data source")(), source.source, columns)


def _dataset_rows(rows: Any, name: str, columns: Collection[str]) -> Iterator[tuple[str, Row]]:
    """Read the rows of a `datasets.Dataset`, or of any iterable of rows; classes that it numbers come by name."""
    features = getattr(rows, "features", None) or {}
    if features:
        rows = rows.select_columns([column for column in columns if column in features])
    named = {column: feature.int2str for column, feature in features.items() if hasattr(feature, "int2str")}
    for number, row in enumerate(rows, start=1):
        for column in named.keys() & row.keys():
            row[column] = None if row[column] is None or row[column] < 0 else named[column](row[column])
        yield f"{name}, row {number}", row


def _parquet_rows(path: Path, columns: Collection[str]) -> Iterator[tuple[int, Row]]:
    from pyarrow import parquet

    with as_input_error(f"{path}: cannot read it"):
        file = parquet.ParquetFile(path)  # the needed columns alone are decoded, as plain values
        wanted = [name for name in file.schema_arrow.names if name in columns]
        batches = file.iter_batches(batch_size=1000, columns=wanted)
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield number, row or dict.fromkeys(file.schema_arrow.names)


def _saved_dataset(path: Path, split: str) -> Any:
    import datasets

    with as_input_error(f"{path} is no folder that `datasets` saved"):
        found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise InputError(f"{path} has the splits {', '.join(found)}, not {split}; name one, as in {{split: …}}")
        return found[split]
    return found


def _hub_builder(source: Source, download: bool = False) -> Any:
    """Look up a dataset of the hub, and download it where asked; no code of it is run."""
    import datasets

    name = source.source.removeprefix("hub:")
    with as_input_error(f"{source.source}: cannot get it from the hub"):
        builder = datasets.load_dataset_builder(name, source.config, revision=source.revision)
        if download:
            builder.download_and_prepare()
        return builder


def _dataset(texts: list[str], labels: list[str | None]) -> Any:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.Value("string")})
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)


SOURCES: dict[str, Callable[..., Any]] = {
    "stdlib-docstrings": stdlib_docstrings,
    "pydoc-topics": pydoc_topics,
    "stdlib-sources": stdlib_sources,
}

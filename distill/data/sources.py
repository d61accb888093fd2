"""Sources of rows: built-in corpora that every Python brings along, files, saved and hub datasets, the user's function.

A built-in corpus is a `datasets.Dataset` with the columns `text` (str) and `label` (str, or None where unlabelled), or
`text` and `pair`.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.files import content_of
from distill.models.weights import as_input_error
from distill.recipe.datafiles import data_files, ending_of, is_saved_dataset, read_rows
from distill.recipe.locate import is_path
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
    return [text for node in ast.walk(tree) if isinstance(node, documented) if (text := _first_paragraph(node))]


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


def stdlib_names(*, shortest: int = 20) -> Any:
    """Read what the public functions and classes of the standard library are called, and how they are described.

    `text` is a name in words after those of its module and class, `pair` the first paragraph of its docstring. The
    texts differ a little between Python versions; the corpus fingerprint in every result says which one it was.

    Args:
        shortest: Paragraphs with fewer characters are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    name_of: dict[str, str] = {}  # keyed by paragraph, as two names with one would both be right
    for path in _library_files(root):
        module = [part for part in path.relative_to(root).with_suffix("").parts if part != "__init__"]
        for names, paragraph in _described(path, module):
            if len(paragraph) >= shortest and not any(name.startswith("_") for name in names):
                name_of.setdefault(paragraph, " ".join(map(_in_words, names)))
    return _dataset(list(name_of.values()), list(name_of), "pair")


def _described(path: Path, module: list[str]) -> Iterator[tuple[list[str], str]]:
    """Yield the qualified name of each function and class in a file, and the first paragraph of its docstring."""
    try:
        found: list[tuple[list[str], ast.AST]] = [(module, ast.parse(path.read_bytes()))]
    except (SyntaxError, ValueError):  # the standard library ships deliberately broken files
        return
    for names, node in found:
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                own = [*names, inner.name]
                yield own, _first_paragraph(inner)
                found += [(own, inner)] if isinstance(inner, ast.ClassDef) else []


def _first_paragraph(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Module) -> str:
    return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())


def _in_words(name: str) -> str:
    """Write `snake_case` and `CamelCase` as words in lower case."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)).lower()


def source_fingerprint(source: Source, base: Path) -> str:
    """Return a sha256 of what a source is made from, without reading rows from it where that can be.

    Of a file its content decides, never its time. A built-in corpus follows from the Python version and the content of
    its standard library, a hub dataset from its commit. What the user's own function reads is not known, so it is
    called, and its rows are hashed.
    """
    if files := data_files(source.source, base):
        return hashlib.sha256("".join(map(content_of, files)).encode()).hexdigest()
    if source.source.startswith("hub:"):
        return str(_hub_builder(source).hash)
    if source.source in SOURCES:
        return _library_fingerprint()
    rows = list(find(SOURCES, source.source, "data source")())
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


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


def read_source(source: Source, split: str, columns: Collection[str], base: Path) -> Iterator[tuple[str, Row]]:
    """Read a source row by row.

    Args:
        source: As the recipe names it.
        split: The split of a dataset that has several, unless the source names one.
        columns: Columns that are needed; others may be left out.
        base: The folder that relative paths start from.

    Yields:
        Where a row comes from, in words, and its values by column.

    Raises:
        InputError: The source is broken; names file and line.
    """
    for path in data_files(source.source, base):
        if is_saved_dataset(path):
            yield from _dataset_rows(_saved_dataset(path, source.split or split), path.name, columns)
        elif ending_of(path) == ".parquet":
            yield from ((f"{path.name}, row {number}", row) for number, row in _parquet_rows(path, columns))
        else:
            yield from ((f"{path.name}, line {number}", row) for number, row in read_rows(path, source))
    if source.source.startswith("hub:"):
        with as_input_error(f"{source.source}: cannot get it from the hub"):
            rows = _hub_builder(source, download=True).as_dataset(split=source.split or split)
        yield from _dataset_rows(rows, source.source, columns)
    elif not is_path(source.source):
        yield from _dataset_rows(find(SOURCES, source.source, "data source")(), source.source, columns)


def _dataset_rows(rows: Any, name: str, columns: Collection[str]) -> Iterator[tuple[str, Row]]:
    """Read the rows of a `datasets.Dataset`, or of any iterable of rows; classes that it numbers come by name."""
    features = getattr(rows, "features", None) or {}
    if features:
        rows = rows.select_columns([column for column in columns if column in features])
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", _by_name(row, features)


def _by_name(row: Row, features: Mapping[str, Any]) -> Row:
    """Replace the numbers of classes, alone or in a list, by their names; a number below 0 stands for none."""
    for column, feature in features.items():
        if column in row and (name := getattr(getattr(feature, "feature", feature), "int2str", None)):
            value = row[column]
            named = [None if each is None or each < 0 else name(each) for each in _listed(value)]
            row[column] = named if isinstance(value, list) else named[0]
    return row


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _parquet_rows(path: Path, columns: Collection[str]) -> Iterator[tuple[int, Row]]:
    from datasets import Features
    from pyarrow import parquet

    with as_input_error(f"{path}: cannot read it"):
        file = parquet.ParquetFile(path)  # the needed columns alone are decoded, as plain values
        features = Features.from_arrow_schema(file.schema_arrow)  # with the names of classes, where `datasets` wrote it
        wanted = [name for name in file.schema_arrow.names if name in columns]
        batches = file.iter_batches(batch_size=1000, columns=wanted)
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield number, _by_name(row, features) or dict.fromkeys(file.schema_arrow.names)


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


def _dataset(texts: Sequence[str], others: Sequence[str | None], column: str = "label") -> Any:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), column: datasets.Value("string")})
    return datasets.Dataset.from_dict({"text": texts, column: others}, features=features)


SOURCES: dict[str, Callable[..., Any]] = {
    "stdlib-docstrings": stdlib_docstrings,
    "pydoc-topics": pydoc_topics,
    "stdlib-sources": stdlib_sources,
    "stdlib-names": stdlib_names,
}

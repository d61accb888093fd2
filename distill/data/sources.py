"""Where texts come from: built-in corpora that every Python brings along, and files.

A source returns a `datasets.Dataset` with the columns `text` (str) and `label` (str, or None where unlabelled).
"""

from __future__ import annotations

import ast
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.errors import InputError

NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
"""Folders of the standard library that are tests, applications or not the library at all."""

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def stdlib_docstrings(*, packages: int = 12, shortest: int = 20) -> Any:
    """First paragraphs of the standard library's docstrings, labelled with the package they document.

    The text differs a little between Python versions; the corpus fingerprint in every result says which one it was.

    Args:
        packages: How many packages, those with the most paragraphs.
        shortest: Paragraphs with fewer characters are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    package_of: dict[str, str] = {}  # keyed by text, which removes duplicates; the first package in path order wins
    for path in sorted(root.glob("*/**/*.py")):
        parts = path.relative_to(root).parts
        if NOT_LIBRARY.isdisjoint(parts):
            for text in _first_paragraphs(path):
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
    """English prose: the topics of Python's own help (`pydoc_data.topics`), one text per topic, unlabelled."""
    from pydoc_data.topics import topics

    texts = [str(text) for _, text in sorted(topics.items())]
    return _dataset(texts, [None] * len(texts))


def stdlib_sources(*, largest: int = 200_000) -> Any:
    """Python: the files of the installed standard library, tests left out, one text per file, unlabelled.

    The text differs a little between Python versions; the corpus fingerprint in every result says which one it was.

    Args:
        largest: Files with more bytes, which are tables of data, are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if NOT_LIBRARY.isdisjoint(path.relative_to(root).parts)]
    texts = [path.read_text(encoding="utf-8") for path in paths if 0 < path.stat().st_size <= largest]
    return _dataset(texts, [None] * len(texts))


def read_file(path: Path, text: str, label: str) -> Any:
    """Texts and labels of a .jsonl, .json, .csv, .parquet or .txt file.

    Raises:
        InputError: The file is missing, empty, broken or lacks the column; the message names file and line.
    """
    if path.suffix not in READERS:
        raise InputError(f"data.source: {path} has none of the known endings {', '.join(sorted(READERS))}")
    if not path.is_file():
        raise InputError(f"data.source: {path} does not exist")
    if path.stat().st_size == 0:
        raise InputError(f"data.source: {path} is empty")
    rows = _read(path)
    column = "text" if path.suffix == ".txt" else text
    if column not in rows.column_names:
        raise InputError(f"data.text: {path} has no column {column!r}; it has {', '.join(rows.column_names)}")
    texts = rows[column]
    for number, value in enumerate(texts, start=1):
        if not isinstance(value, str):
            raise InputError(f"{path}: row {number}: column {column!r} holds {value!r}, not text")
    labels = rows[label] if label in rows.column_names else [None] * len(rows)
    return _dataset(list(texts), [None if value is None or value == "" else str(value) for value in labels])


def _read(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train")
    except (datasets.exceptions.DatasetGenerationError, StopIteration, OSError, ValueError) as error:
        # The library's own message names neither the file nor the line; its cause usually names the line.
        cause = error.__cause__ or error
        raise InputError(f"data.source: cannot read {path}: {cause}") from error


def _dataset(texts: list[str], labels: list[str | None]) -> Any:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.Value("string")})
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)


SOURCES: dict[str, Callable[..., Any]] = {
    "stdlib-docstrings": stdlib_docstrings,
    "pydoc-topics": pydoc_topics,
    "stdlib-sources": stdlib_sources,
}

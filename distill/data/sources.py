"""Sources of texts: built-in corpora that every Python brings along, and files.

A source returns a `datasets.Dataset` with the columns `text` (str) and `label` (str, or None where unlabelled).
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.files import sha256_of
from distill.recipe.locate import data_file
from distill.registry import find

NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
"""Folders of the standard library that are tests, applications or not the library at all."""

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


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


def source_fingerprint(source: str, base: Path) -> str:
    """Return a sha256 of what a source is made from, without reading texts from it where that can be.

    Of a file its content decides, never its time. A built-in corpus follows from the Python version and the content of
    its standard library. What the user's own function reads is not known, so it is called, and its rows are hashed.
    """
    file = data_file(source, base)
    if file is not None:
        return sha256_of(file)
    if source in SOURCES:
        return _library_fingerprint()
    rows = find(SOURCES, source, "data source")()
    return hashlib.sha256(json.dumps([list(rows["text"]), list(rows["label"])]).encode()).hexdigest()


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


def read_rows(path: Path, text: str, label: str) -> Any:
    """Read texts and labels from a file that `data_file` gave.

    Raises:
        InputError: The file is broken or lacks the column; the message names file and line.
    """
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
        # A cache of its own, which goes with the block: the library's would take an edited file for the old one, and
        # keep the user's texts in the home folder.
        with tempfile.TemporaryDirectory(prefix="distill-") as cache:
            return datasets.load_dataset(
                READERS[path.suffix], data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
            )
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

"""Corpora that every Python brings along, each a `datasets.Dataset`.

Columns: `text`, and `label` (None where unlabelled) or `pair`.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(sysconfig.get_paths()["stdlib"])
NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
"""Folders of the standard library that are tests, applications or not the library at all."""


def stdlib_docstrings(*, packages: int = 12, shortest: int = 20) -> Any:
    """Read the first paragraphs of the standard library's docstrings, labelled with the package they document.

    The text differs a little between Python versions; the corpus fingerprint in every result says which one it was.

    Args:
        packages: How many packages, those with the most paragraphs.
        shortest: Paragraphs with fewer characters are left out.
    """
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    package_of: dict[str, str] = {}  # keyed by text, which removes duplicates; the first package in path order wins
    for path in _library_files():
        package, *inner = path.relative_to(ROOT).parts
        for node in ast.walk(_parse(path)) if inner else ():
            text = _first_paragraph(node) if isinstance(node, documented) else ""
            if text and len(text) >= shortest:
                package_of.setdefault(text, package)
    largest = [name for name, _ in Counter(package_of.values()).most_common(packages)]
    rows = [(text, package) for text, package in package_of.items() if package in largest]
    return _dataset([text for text, _ in rows], [package for _, package in rows])


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # the standard library ships deliberately broken files
        return ast.Module([], [])


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
    texts = [path.read_text(encoding="utf-8") for path in _library_files() if 0 < path.stat().st_size <= largest]
    return _dataset(texts, [None] * len(texts))


def stdlib_names(*, shortest: int = 20) -> Any:
    """Read what the public functions and classes of the standard library are called, and how they are described.

    `text` is a name in words after those of its module and class, `pair` the first paragraph of its docstring. The
    texts differ a little between Python versions; the corpus fingerprint in every result says which one it was.

    Args:
        shortest: Paragraphs with fewer characters are left out.
    """
    name_of: dict[str, str] = {}  # keyed by paragraph, as two names with one would both be right
    for path in _library_files():
        module = [part for part in path.relative_to(ROOT).with_suffix("").parts if part != "__init__"]
        for names, paragraph in _described(path, module):
            if len(paragraph) >= shortest and not any(name.startswith("_") for name in names):
                name_of.setdefault(paragraph, " ".join(map(_in_words, names)))
    return _dataset(list(name_of.values()), list(name_of), "pair")


def _described(path: Path, module: list[str]) -> Iterator[tuple[list[str], str]]:
    """Yield the qualified name of each function and class in a file, and the first paragraph of its docstring."""
    found: list[tuple[list[str], ast.AST]] = [(module, _parse(path))]
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


@lru_cache(maxsize=1)
def library_fingerprint() -> str:
    """Return a sha256 of the Python version and the content of its standard library."""
    digest = hashlib.sha256(sys.version.encode())
    for path in _library_files():
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT)}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def _library_files() -> list[Path]:
    """List the modules of the standard library, in the order of their paths."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in NOT_LIBRARY]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


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

"""Turn the docstrings of the installed standard library into JSON-lines files for retrieval, split by name.

    python scripts/data/docstring_pairs.py --out data/docstrings
    python scripts/data/docstring_pairs.py --out data/docstrings --shortest 40 --held-out 0.2

Writes train.jsonl, validation.jsonl and test.jsonl with the columns text, the name of a function or class in words
after its module and class ("tarfile tar file extractall" for tarfile.TarFile.extractall), and pair, the first paragraph
of its docstring. The last part of the name decides the split, so that a method and what overrides it are in one. The
texts differ a little between versions of Python; README.md says which one it was.
"""

import ast
import re
import shutil
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from split_by_key import Keyed, exit_code_of, parser_of, write_readme, write_splits

NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    """Read the library, write the splits and its licence."""
    parser = parser_of(__doc__, limit=20_000, held_out_limit=4_000)
    parser.add_argument("--shortest", type=int, default=20, help="characters that a paragraph has at least")
    options = parser.parse_args()
    root = Path(sysconfig.get_paths()["stdlib"])
    notes: Counter[str] = Counter()
    counts = {"rows": write_splits(options.out, documented(root, options.shortest, notes), "pair", options, notes)}
    if (root / "LICENSE.txt").is_file():
        shutil.copyfile(root / "LICENSE.txt", options.out / "LICENSE")
    about = f"Docstrings of Python {sys.version.split()[0]}, Copyright Python Software Foundation, PSF licence."
    write_readme(options.out, "Python's standard library", about, __doc__, counts)


def documented(root: Path, shortest: int, notes: Counter[str]) -> Iterator[Keyed]:
    """Yield public functions and classes with the first paragraph of their docstrings, each paragraph once."""
    seen: set[str] = set()
    for names, _node, docstring in described(root, notes):
        paragraph = " ".join(docstring.split("\n\n")[0].split())
        if len(paragraph) < shortest:
            notes["paragraphs that are too short"] += 1
        elif paragraph in seen:
            notes["paragraphs that another name has too"] += 1
        else:
            seen.add(paragraph)
            yield (in_words(names[-1]),), {"text": " ".join(map(in_words, names)), "pair": paragraph}


def described(root: Path, notes: Counter[str]) -> Iterator[tuple[list[str], Definition, str]]:
    """Yield the public functions and classes of a library that have a docstring: qualified name, node, docstring."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if NOT_LIBRARY & set(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            notes["files that are broken on purpose"] += 1
            continue
        for names, node in definitions(tree, [part for part in parts if part != "__init__"]):
            docstring = ast.get_docstring(node)
            if not docstring or any(name.startswith("_") for name in names):
                notes["names that are private or without docstring"] += 1
            else:
                yield names, node, docstring


def definitions(tree: ast.AST, names: list[str]) -> Iterator[tuple[list[str], Definition]]:
    """Yield classes and functions with their qualified names, those within classes too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition):
            yield [*names, node.name], node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, [*names, node.name])


def in_words(name: str) -> str:
    """Write `snake_case` and `CamelCase` as words in lower case."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)).lower()


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

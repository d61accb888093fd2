"""The shape of the package: how large its pieces are, which of them know each other, and what they are called."""

from __future__ import annotations

import ast
import graphlib
import io
import re
import tokenize
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "distill").rglob("*.py"))
BUDGET = 22_700
"""Code lines of the package: without docstrings, comments and blank lines. It goes down, and was raised twice: by what
the teacher's other lives, the evidence and the other forms of a release took, and by GGUF and words about odd data."""
PACKAGES = {
    "data", "evaluation", "losses", "models", "pipeline", "recipe", "release", "student", "teacher", "training",
}  # fmt: skip
MODULES = {"__init__", "__main__", "cli", "errors", "files", "ranks", "registry", "terminal", "verbs"}
DRAWERS = {"utils", "util", "common", "base", "helpers", "helper", "misc", "tools", "core"}
"""Names under which everything ends up."""


def name_of(path):
    return str(path.relative_to(ROOT))


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def code_lines(path):
    """Count the lines that hold more than blanks, comments and strings that nobody reads, such as docstrings."""
    words = {tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP}
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    lines = {line for token in tokens if token.type in words for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_code_lines_are_counted_without_what_nobody_runs(tmp_path):
    text = '"""One\n\ntwo."""\n\nx = """a\nb"""  # c\n# d\n\n\ndef f():\n    "e"\n    return 1\n'
    (tmp_path / "some.py").write_text(text)
    assert code_lines(tmp_path / "some.py") == 4


def test_the_package_stays_within_its_budget_of_code_lines():
    assert sum(map(code_lines, SOURCES)) <= BUDGET


def test_no_function_is_longer_than_a_page():
    nodes = [(path, node) for path in SOURCES for node in ast.walk(tree_of(path))]
    functions = [(path, node) for path, node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [f"{name_of(path)}: {f.name}" for path, f in functions if f.end_lineno - f.lineno >= 60]


def imported_by(path, known):
    """The modules of this package that a file imports anywhere, also within functions and for type checkers."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}, line {node.lineno}: a relative import"
            for alias in node.names if node.module in known else ():
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


@cache
def imports():
    """Module -> the modules of this package that it imports."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES}
    return {name: {*imported_by(path, set(names.values()))} for path, name in names.items()}


def test_modules_do_not_import_each_other_in_a_circle():
    assert {"distill.pipeline", "distill.recipe.load"} <= imports()["distill.cli"]  # both are lazy
    graphlib.TopologicalSorter(imports()).prepare()  # raises CycleError, which names the circle


def test_packages_do_not_import_each_other_in_a_circle():
    def top(name):
        return name.split(".")[1] if "." in name else name

    graph = {top(name): set() for name in imports()}
    for name, others in imports().items():
        graph[top(name)] |= {top(other) for other in others} - {top(name)}
    assert len(graph["pipeline"]) > 5
    graphlib.TopologicalSorter(graph).prepare()


def test_every_file_has_its_room_and_no_room_is_a_drawer_for_odds_and_ends():
    tops = {path.relative_to(ROOT / "distill").parts[0].removesuffix(".py") for path in SOURCES}
    assert tops == PACKAGES | MODULES
    assert {path.parent.name for path in ROOT.glob("tests/*/test_*.py")} <= PACKAGES | {"cli"}
    words = {word for path in SOURCES for part in path.relative_to(ROOT).parts for word in re.split(r"[_.]", part)}
    assert not words & DRAWERS

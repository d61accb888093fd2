"""Names in recipes and the functions they stand for.

A strategy is one function and one row in a literal table; its keyword-only parameters are its schema. `find` and
`bind` turn a name and its `params` into a callable; `names_in` reads a table without importing the module it stands in,
so that a recipe is checked in milliseconds, without torch, from that same table.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from distill.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])

_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_SIMPLE = {"int": int, "float": float, "bool": bool, "str": str, "None": type(None)}
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}


def nearest(name: str, options: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The option that `name` most likely means, `-` and case aside; None when nothing is close."""
    spelt = {option.lower().replace("-", "_"): option for option in options}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), spelt, n=1, cutoff=cutoff)
    return spelt[close[0]] if close else None


def is_reference(name: str) -> bool:
    """Whether `name` has the form `package.module:function`."""
    return _REFERENCE.fullmatch(name) is not None


def find(table: Mapping[str, F], name: str, what: str) -> F:
    """The function called `name`: a row of `table`, or `package.module:function` from the user's own code.

    Raises:
        InputError: the table has no such row, or the user's function cannot be imported.
    """
    if name in table:
        return table[name]
    if is_reference(name):
        return cast("F", _imported(name, what))  # what it accepts shows in `bind` and in use
    close = nearest(name, table)
    hint = f"did you mean {close!r}? " if close else ""
    raise InputError(
        f"unknown {what} {name!r}; {hint}The options are {', '.join(table)}, or your own package.module:function."
    )


def bind(function: F, params: Mapping[str, Any], where: str, *, any_name: bool = False) -> F | partial[Any]:
    """`function` with `params` filled in, each checked against the function's keyword-only parameters.

    Args:
        function: A strategy.
        params: What the recipe gives.
        where: Key of the recipe, for messages.
        any_name: Take parameters that could be given by position as well: classes of other packages have such.

    Raises:
        InputError: the function has no such parameter, or the value is not of the annotated type.
    """
    if not params:
        return function
    accepted = inspect.signature(function).parameters
    kinds = {inspect.Parameter.KEYWORD_ONLY} | ({inspect.Parameter.POSITIONAL_OR_KEYWORD} if any_name else set())
    own = {name: p for name, p in accepted.items() if p.kind in kinds}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    for name, value in params.items():
        if name in own:
            _check_type(own[name].annotation, value, f"{where}.{name}")
        elif not takes_any:
            close = nearest(name, own)
            hint = f"did you mean {close!r}? " if close else ""
            allowed = f"It has {', '.join(own)}." if own else "It has no parameters."
            label = getattr(function, "__name__", str(function))
            raise InputError(f"{where}.{name}: {label} has no parameter {name!r}; {hint}{allowed}")
    return partial(function, **params)


def literal_in(module: str, name: str) -> Any:
    """The plain value that `module` assigns to `name`, without importing it.

    Raises:
        LookupError: the module or the name does not exist. That is a mistake in distill, not in a recipe.
    """
    return ast.literal_eval(_assigned(module, name)[1])


def names_in(module: str, table: str) -> dict[str, list[str] | None]:
    """The rows of a literal table in `module`, with the keyword-only parameters of each row's function.

    The source is parsed, not imported: the modules that hold strategies import torch. None in place of parameters means
    that they cannot be known this way (a function from another file, a class, `**kwargs`).

    Raises:
        LookupError: the module or the table does not exist. That is a mistake in distill, not in a recipe.
    """
    tree, value = _assigned(module, table)
    functions = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {name: _keyword_only(functions, row) for name, row in _rows(value, f"{module}:{table}")}


def _assigned(module: str, name: str) -> tuple[ast.Module, ast.expr]:
    """A module's source, and what it assigns to a name at the top."""
    source = _source(module)
    tree = ast.parse(source.read_text(encoding="utf-8"), str(source))
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == name and isinstance(node, ast.Assign | ast.AnnAssign):
            return tree, node.value or ast.Constant(None)
    raise LookupError(f"{source} has no literal table {name}")


def _imported(name: str, what: str) -> Any:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"{what} {name!r} cannot be imported: {error}. Install its package, or put its folder on PYTHONPATH."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        close = nearest(function_name, [key for key, value in vars(module).items() if callable(value)])
        hint = f"; did you mean {module_name}:{close}?" if close else ""
        raise InputError(f"{what} {name!r}: {module_name} has no function {function_name!r}{hint}")
    return function


def _check_type(annotation: Any, value: Any, where: str) -> None:
    """Refuse a value that a plain annotation excludes; anything but unions of int, float, bool, str, None is passed."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    names = [name.strip() for name in text.split("|")]
    if not all(name in _SIMPLE for name in names):
        return
    kinds = {_SIMPLE[name] for name in names}
    # An exact type, as True is an int to isinstance; whole numbers are numbers.
    if type(value) not in kinds and not (type(value) is int and float in kinds):
        allowed = " or ".join(_WORDS[name] for name in names)
        raise InputError(f"{where}: expected {allowed}, got {value!r}")


def _source(module: str) -> Path:
    """File of a module, found without importing any of its parent packages, whose `__init__` may import torch."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    candidates = [Path(spec.origin)] if spec and spec.origin and not rest else []
    for folder in (spec.submodule_search_locations or []) if spec and rest else []:
        path = Path(folder, *rest)
        candidates += [path.with_name(f"{path.name}.py"), path / "__init__.py"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise LookupError(f"module {module} has no source file")


def _rows(table: ast.expr | None, where: str) -> list[tuple[str, ast.expr]]:
    if not isinstance(table, ast.Dict):
        raise LookupError(f"{where} is not a literal table: {{'name': function, …}}")
    rows = []
    for key, value in zip(table.keys, table.values, strict=True):
        if not (isinstance(key, ast.Constant) and isinstance(key.value, str)):
            raise LookupError(f"{where} is not a literal table: line {value.lineno} has no text as its key")
        rows.append((key.value, value))
    return rows


def _keyword_only(functions: Mapping[str, ast.arguments], value: ast.expr) -> list[str] | None:
    arguments = functions.get(value.id) if isinstance(value, ast.Name) else None
    if arguments is None or arguments.kwarg is not None:
        return None
    return [argument.arg for argument in arguments.kwonlyargs]

"""Names in recipes and the functions they stand for.

A strategy is one function and one row in a literal table; its keyword-only parameters are its schema. `find` and
`bind` turn a name and its `params` into a callable. What a recipe may name is listed in `distill.recipe.names`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

from distill.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])

REFERENCE = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*"
"""The form of `package.module:function`."""
_SIMPLE = {"int": int, "float": float, "bool": bool, "str": str, "None": type(None)}
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}


def nearest(name: str, options: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Find the option that `name` most likely means, `-` and case aside; None when nothing is close."""
    spelt = {option.lower().replace("-", "_"): option for option in options}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), spelt, n=1, cutoff=cutoff)
    return spelt[close[0]] if close else None


def suggest(name: str, options: Iterable[str], start: str = "") -> str:
    """Ask "did you mean …? " of the nearest option, with `start` in front of it; empty when nothing is close."""
    close = nearest(name, options)
    return f"did you mean {start + close!r}? " if close else ""


def is_reference(name: str) -> bool:
    """Tell whether `name` has the form `package.module:function`."""
    return re.fullmatch(REFERENCE, name) is not None


def find(table: Mapping[str, F], name: str, what: str) -> F:
    """Find the function called `name`: a row of `table`, or `package.module:function` from the user's own code.

    Raises:
        InputError: the table has no such row, or the user's function cannot be imported or called as the rows are.
    """
    if name in table:
        return table[name]
    if is_reference(name):
        function = _import(name, what)
        _check_takes(function, table.values(), f"{what} {name!r}")
        return cast("F", function)  # which parameters it accepts shows in `bind`
    options = f"{suggest(name, table)}The options are {', '.join(table)}, or your own package.module:function."
    raise InputError(f"unknown {what} {name!r}; {options}")


def bind(function: F, params: Mapping[str, Any], where: str) -> F | partial[Any]:
    """Fill `params` into `function`; each must be one that is keyword-only or, as in classes of others, has a default.

    Args:
        function: A strategy.
        params: What the recipe gives.
        where: Key of the recipe, for messages.

    Raises:
        InputError: the function has no such parameter, or the value is not of the annotated type.
    """
    if not params:
        return function
    accepted = inspect.signature(function).parameters
    own = {name: p for name, p in accepted.items() if p.kind is p.KEYWORD_ONLY or p.default is not p.empty}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    for name, value in params.items():
        if name in own:
            if mismatch := type_mismatch(own[name].annotation, value):
                raise InputError(f"{where}.{name}: {mismatch}")
        elif not takes_any:
            label = getattr(function, "__name__", str(function))
            raise InputError(f"{where}.{name}: {label} has no parameter {name!r}; {unknown_param(name, own)}")
    return partial(function, **params)


def unknown_param(name: str, accepted: Collection[str]) -> str:
    """Say what to do about a parameter that a function does not have."""
    return f"{suggest(name, accepted)}It has {', '.join(accepted)}" if accepted else "remove it; it has none"


def type_mismatch(annotation: Any, value: Any) -> str:
    """Say how a value differs from a plain annotation; anything but unions of int, float, bool, str, None is passed."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    names = [name.strip() for name in text.split("|")]
    kinds = {_SIMPLE.get(name) for name in names}
    # An exact type, as True is an int to isinstance; whole numbers are numbers.
    if None in kinds or type(value) in kinds or (type(value) is int and float in kinds):
        return ""
    return f"expected {' or '.join(_WORDS[name] for name in names)}, got {value!r}"


def _check_takes(function: Callable[..., Any], rows: Iterable[Callable[..., Any]], what: str) -> None:
    """Refuse a function of the user's that cannot be called as every row of its table is, with that many arguments.

    What the rows take by keyword, as optimizers their `lr`, a function may also take by position.
    """
    known = [inspect.signature(row).parameters.values() for row in rows]
    named = {each.name for row in known for each in row if each.kind is each.KEYWORD_ONLY}
    counts = {
        sum(each.kind is each.POSITIONAL_OR_KEYWORD and each.default is each.empty for each in row) for row in known
    }
    try:
        own = inspect.signature(function).parameters.values()
    except ValueError as error:  # of some functions in C nothing is known
        raise InputError(
            f"{what} does not say which parameters it takes; call it in a function of your own, and name that"
        ) from error
    by_place = [each for each in own if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    least = sum(each.default is each.empty and each.name not in named for each in by_place)
    most = math.inf if any(each.kind is each.VAR_POSITIONAL for each in own) else len(by_place)
    if len(counts) == 1 and not least <= min(counts) <= most:
        raise InputError(f"{what} cannot be called with {min(counts)} arguments by position, as the others are")


def _import(name: str, what: str) -> Any:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        fix = "Install its package, or put its folder on PYTHONPATH."
        raise InputError(f"{what} {name!r} cannot be imported: {error}. {fix}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value)]
        hint = suggest(function_name, functions, f"{module_name}:")
        raise InputError(f"{what} {name!r}: {module_name} has no function {function_name!r}; {hint}")
    return function

"""Plain English for the findings of the schema: the value given, the values allowed, and the likely intention."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from types import NoneType
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from distill.recipe.data import FILE, HUB, LINE
from distill.recipe.datafiles import ENDINGS
from distill.recipe.document import Document, at
from distill.recipe.fields import KeyPath, Mistake, Section, dotted
from distill.recipe.foreign import ADVICE, RENAMED, UNSUPPORTED
from distill.recipe.rules import PARTS
from distill.recipe.schema import NAME, Recipe, Term
from distill.recipe.sections import SHA256
from distill.recipe.yaml import scalar
from distill.registry import REFERENCE, nearest, suggest

NO_SECTIONS = ("losses", "teachers", "given")
"""Parts that are lists or single values."""
SECTIONS = sorted([(), ("student",), *(path for name, path in PARTS.items() if name not in NO_SECTIONS)], key=len)
"""Every section outside lists, the recipe itself first."""
_PATTERNS = {
    NAME: "letters, digits, '.', '_' and '-', starting with a letter or digit",
    SHA256: "64 hexadecimal digits in lower case",
    f"^{REFERENCE}$": "package.module:function",
    FILE: "./FILE",
    HUB: "hub:ORG/NAME",
    LINE: 'a line without a line break, "" for an empty one',
}
_PLAIN = (
    ("a valid integer", "a whole number"), ("a valid number", "a number"), ("a finite number", "a number"),
    ("a valid string", "text"), ("a valid boolean", "true or false"), ("a valid list", "a list"),
    ("a valid tuple", "a list"), ("a valid dictionary", "a section of names and values"),
    ("greater than or equal to", "at least"), ("less than or equal to", "at most"), ("greater than", "above"),
    ("less than", "below"),
)  # fmt: skip
"""Pydantic's words -> those of a recipe."""
SWITCHES = {"yes": True, "on": True, "no": False, "off": False}
"""Words for true and false that are text in YAML 1.2."""
_GIVEN = {bool: "", int: "the number ", float: "the number ", str: "the text ", list: "the list ", dict: "the section "}


def check_schema(document: Document) -> tuple[Recipe | None, list[Mistake], set[KeyPath]]:
    """Check a document against the schema.

    A misspelt or misplaced key is reported and then put right in the document, so that nothing is said to be missing
    because of it. The keys inside of a misspelt section are checked; other values of such keys are not judged.

    Returns:
        The recipe, where there is nothing to report; what is wrong; and the paths whose values are not judged.
    """
    found: list[Mistake] = []
    moved: set[KeyPath] = set()
    while True:
        try:
            return Recipe.model_validate(document.data), found, moved
        except ValidationError as error:
            errors = error.errors(include_url=False, include_input=False)
        unknown = [each["loc"] for each in errors if each["type"] == "extra_forbidden"]
        if not unknown:
            return None, found + _explain(errors, document.data), moved
        for path in unknown:
            mistake, meant = _unknown_key(path, document, moved)
            found.append(mistake)
            if meant is None:
                at(document.data, path[:-1]).pop(path[-1])
            else:
                document.move(path, meant)
                moved |= set() if isinstance(at(document.data, meant), dict) else {meant}


def valid_parts(data: Any) -> dict[str, Any]:
    """Return the parts that the rules across sections read, as far as they are right in themselves."""
    parts: dict[str, Any] = {"terms": {}}
    for name, path in PARTS.items():
        default = _field(path).get_default(call_default_factory=True)  # type: ignore[union-attr]
        with suppress(ValidationError):
            parts[name] = _parse(at(data, path, default), path)
    losses = at(data, ("losses",))
    for index, value in enumerate(losses if isinstance(losses, list) else []):
        with suppress(ValidationError):
            parts["terms"][index] = Term.model_validate(value)
    return parts


def _field(path: KeyPath) -> FieldInfo | None:
    """Return the field of a key; None for a path that ends in an item of a list or in a dictionary."""
    section: type[Section] | None = Recipe
    field = None
    for key in path:
        if isinstance(key, str):
            field = section.fields_by_key().get(key) if section else None
            section = next(iter(_sections_in(field.annotation)), None) if field else None
    return field if isinstance(path[-1], str) else None


def _keys(path: KeyPath) -> list[str]:
    """Return the keys of a section; of a list of sections, those of its items."""
    names = [key for key in path if isinstance(key, str)]
    field = _field(tuple(names)) if names else None
    return list(_sections_in(field.annotation if field else Recipe)[0].fields_by_key())


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for each in get_args(annotation) for section in _sections_in(each)]


def _unknown_key(path: KeyPath, document: Document, moved: set[KeyPath]) -> tuple[Mistake, KeyPath | None]:
    """Describe an unknown key, and return where it should be when that is clear and free."""
    section, key = path[:-1], str(path[-1])
    # The location is noted now: once the key is moved, the document knows it under its new path only.
    mistake = Mistake(path, "unknown key", at="key", location=document.keys.get(path))
    plain, value = key.lower().replace("-", "_"), at(document.data, path)
    siblings = _keys(section)
    if plain in UNSUPPORTED:
        return replace(mistake, message="not supported", fix="remove it"), None
    if plain in ADVICE:
        return replace(mistake, fix=ADVICE[plain]), None
    wanted = RENAMED.get(plain, key)
    elsewhere = [other for other in SECTIONS if wanted in _keys(other) and other != section]
    elsewhere = [other for other in elsewhere if _fits(value, (*other, wanted))]
    # A close spelling beats a key of another section, which beats a distant spelling.
    close = wanted if wanted in siblings else None if plain in RENAMED else nearest(key, siblings, 0.8)
    close = close or (None if elsewhere or plain in RENAMED else nearest(key, siblings))
    if close:
        meant: KeyPath = (*section, close)
        fix = f"did you mean {close!r}?" if _fits(value, meant) else _list_keys(section, siblings)
        if close in at(document.data, section):
            return replace(mistake, fix=f"{fix} It is given as well: remove one of them"), None
        return replace(mistake, fix=fix), meant
    if elsewhere:
        return _misplaced(mistake, wanted, elsewhere, document, moved)
    if wanted in Term.model_fields:
        return replace(mistake, fix="belongs in an item of losses:"), None
    return replace(mistake, fix=_list_keys(section, siblings)), None


def _misplaced(
    mistake: Mistake, wanted: str, elsewhere: Sequence[KeyPath], document: Document, moved: set[KeyPath]
) -> tuple[Mistake, KeyPath | None]:
    """Describe a key of other sections; one that stands there with nothing in it was meant to hold the key."""
    written = [section for section in elsewhere if section and section in document.keys]
    empty = [
        section for section in written if all((*section, key) in moved for key in at(document.data, section) or ())
    ]
    target = (*empty, *elsewhere)[0]
    names = [f"under {dotted(section)}:" if section else "at the top of the recipe" for section in elsewhere]
    renamed = "" if wanted == mistake.path[-1] else f" as {wanted}:"
    mistake = replace(mistake, fix=f"belongs {' or '.join(names)}{renamed}")
    if empty:
        fix = f"put spaces in front of it, so that it belongs to {dotted(target)}:{renamed}"
        mistake = replace(mistake, message=f"indented wrongly: {dotted(target)}: has nothing in it", fix=fix)
    elif not target and _sections_in(Recipe.fields_by_key()[wanted].annotation):
        fix = f"move it to the left; it {mistake.fix}"
        mistake = replace(
            mistake, message=f"indented wrongly: {wanted}: is no key of {dotted(mistake.path[:-1])}:", fix=fix
        )
    around = at(document.data, target[:-1])
    if target and isinstance(around, dict) and around.get(target[-1]) is None:
        around[target[-1]] = {}
    section = at(document.data, target)
    free = isinstance(section, dict) and section.get(wanted) is None
    return mistake, (*target, wanted) if free else None


def _list_keys(section: KeyPath, keys: list[str]) -> str:
    return f"remove it; {f'{dotted(section)}:' if section else 'a recipe'} has {', '.join(keys)}"


def _fits(value: Any, path: KeyPath) -> bool:
    """Tell whether a value is of a kind that a key takes, limits and spelling aside."""
    field = _field(path)
    if field and _sections_in(field.annotation) and (value is None or isinstance(value, dict)):
        return True
    kinds = [each["type"] for each in _errors(value, path)]
    wrong = [kind.endswith(("_type", "_parsing", "_from_float")) for kind in kinds]
    return not kinds or (not all(wrong) and not (set(kinds) == {"literal_error"} and not isinstance(value, str)))


def _parse(value: Any, path: KeyPath) -> Any:
    field = _field(path)
    assert field is not None, f"{path} is no key"
    return TypeAdapter(field.rebuild_annotation()).validate_python(value)


def _errors(value: Any, path: KeyPath) -> list[ErrorDetails]:
    """List what pydantic says about a value for a key."""
    try:
        _parse(value, path)
    except ValidationError as error:
        return error.errors(include_url=False, include_input=False)
    return []


def _explain(errors: list[ErrorDetails], data: Any) -> list[Mistake]:
    """Turn what pydantic says into mistakes: broken rules, missing keys, wrong values."""
    found: list[Mistake] = []
    wrong: dict[KeyPath, list[ErrorDetails]] = {}
    for each in errors:
        path = _real_path(each["loc"], data)
        # In a pair such as betas, pydantic calls an absent item missing: there the pair is what is wrong.
        if each["type"] == "missing" and isinstance(each["loc"][-1], str):
            path = (*path, each["loc"][-1])
            found.append(Mistake(path, f"missing; give {_allowed(_errors(object(), path), path)[0]}", at="key"))
        elif each["type"] != "mistakes":
            wrong.setdefault(path, []).append(each)
        elif path:  # those of the recipe itself are between sections
            found += [replace(own, path=(*path, *own.path)) for own in each["ctx"]["mistakes"]]
    reported = [*wrong, *(mistake.path for mistake in found)]
    for path, own in wrong.items():
        # Where several forms are allowed, each complains; the deepest complaint is about the form that was meant.
        if not any(len(other) > len(path) and other[: len(path)] == path for other in reported):
            found.append(_wrong_value(path, at(data, path), own))
    return found


def _real_path(loc: KeyPath, data: Any) -> KeyPath:
    """Drop the names of union branches, which are not keys of the data, from pydantic's location."""
    path: KeyPath = ()
    for part in loc:
        if at(data, (*path, part), default=data) is not data:
            path = (*path, part)
    return path


def _allowed(errors: list[ErrorDetails], path: KeyPath) -> tuple[str, list[str]]:
    """Put into words what pydantic expected, and list the names among it."""
    names: list[str] = []
    words: list[str] = []
    for each in errors:
        context = each.get("ctx", {})
        if each["type"] == "literal_error":
            names += re.findall(r"'([^']+)'", context["expected"])
        elif each["type"] == "model_type":
            words.append(f"a section with the keys {', '.join(_keys(path))}")
        elif each["type"] == "string_pattern_mismatch":
            words.append(_PATTERNS[context["pattern"]])
        elif each["type"] in ("missing", "too_short", "too_long"):
            words.append("more items" if each["type"] != "too_long" else "fewer items")
        else:
            text = each["msg"].removeprefix("Input should be ").partition(",")[0]
            for theirs, ours in _PLAIN:
                text = text.replace(theirs, ours)
            words.append(text)
    options = f"one of {', '.join(names)}" if len(names) > 1 else "".join(names)
    field = _field(path)
    nullable = ["null"] if field is not None and NoneType in get_args(field.annotation) else []
    return " or ".join(dict.fromkeys(filter(None, [options, *words, *nullable]))), names


def _wrong_value(path: KeyPath, value: Any, errors: list[ErrorDetails]) -> Mistake:
    allowed, names = _allowed(errors, path)
    guess = _guess(path, value) if _field(path) else ""
    fix = guess or (suggest(value, names).strip() if isinstance(value, str) else "")
    return Mistake(path, f"expected {allowed}, got {format_value(value)}", fix)


def _guess(path: KeyPath, value: Any) -> str:
    """Say what to write where another spelling of the value is one that the key takes."""
    guesses: list[Any] = []
    if isinstance(value, str):
        guesses = [scalar(value), *(meant for word, meant in SWITCHES.items() if value.lower() == word)]
        guesses += [f"./{value}"] if value.endswith(ENDINGS) and "://" not in value else []
    elif type(value) in (int, float):
        guesses = [*([int(value)] if value == value // 1 else []), str(value)]
    fitting = [guess for guess in guesses if not _errors(guess, path)]
    text = fitting and (fitting[0] if fitting[0] == f"./{value}" else json.dumps(fitting[0]))
    return f"write {text}" if text else ""


def format_value(value: Any) -> str:
    """Write a value as the user did, with its kind where that is the point, cut to fit a line."""
    if value is None:
        return "null (nothing)"
    # Not finite numbers are written as in YAML.
    text = json.dumps(value, ensure_ascii=False).replace("Infinity", ".inf").replace("NaN", ".nan")
    return _GIVEN[type(value)] + (text if len(text) <= 60 else f"{text[:60]}…")

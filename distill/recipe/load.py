"""From a file and overrides to a `Recipe`, or to one error with every problem in the order of the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from distill.errors import Problem, RecipeError
from distill.recipe.document import Document, at
from distill.recipe.explain import valid_parts, validate
from distill.recipe.fields import KeyPath, Location
from distill.recipe.headers import look_at_data, look_at_teacher
from distill.recipe.locate import teacher_folder
from distill.recipe.rules import check_together, parts_of
from distill.recipe.schema import Recipe
from distill.recipe.yaml import read_file, read_text, scalar

__all__ = ["dump", "fingerprint", "load_recipe", "teacher_folder"]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check everything that can be known without loading a model.

    Args:
        path: The YAML file. Folders in it are relative to the file.
        overrides: `key.path=value` each, e.g. `losses.0.weight=0.5`; values are YAML. The last of two equal keys holds.

    Raises:
        RecipeError: The recipe is wrong; lists all problems.
        InputError: The file cannot be read.
    """
    path = Path(path)
    document = read_file(path)
    if not isinstance(document.data, dict):
        place = document.values[()].text
        raise RecipeError([Problem(place, "recipe", "a recipe is a section of keys", "start with `name: …`")])
    ranked = _override(document, overrides)
    recipe, mistakes, moved = validate(document)
    parts = parts_of(recipe) if recipe else valid_parts(document.data)
    base = path.absolute().parent
    size, of_teacher = look_at_teacher(parts.get("teacher"), base)
    of_data = look_at_data(parts.get("data"), base)
    reported = {mistake.path for mistake in mistakes}
    for mistake in (*of_teacher, *of_data, *check_together(parts, size)):
        mistakes += [] if mistake.path in reported else [mistake]
    mistakes = [each for each in mistakes if not any(each.path[: len(own)] == own for own in moved)]
    ranked += [document.problem(mistake) for mistake in document.mistakes + mistakes]
    if recipe is None or ranked:
        raise RecipeError([problem for _, problem in sorted(ranked, key=lambda entry: entry[0])])
    return recipe


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; loads back to an equal recipe."""
    yaml = YAML()
    yaml.width = 2**20  # long text stays on its line
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.Representer = _Writer
    stream = StringIO()
    yaml.dump(_styled(recipe.model_dump(mode="json")), stream)
    return stream.getvalue()


def fingerprint(value: Any) -> str:
    """sha256 of a section, a dict or a list as canonical JSON: the order of keys does not matter."""
    text = json.dumps(to_jsonable_python(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _styled(value: Any) -> Any:
    if isinstance(value, dict):
        return {_styled(key): _styled(item) for key, item in value.items()}
    if isinstance(value, list):
        items = CommentedSeq(_styled(item) for item in value)
        if not any(isinstance(item, dict) for item in value):
            items.fa.set_flow_style()
        return items
    # The reader decides what needs quotes: the writer's library takes other words for numbers and dates.
    if isinstance(value, str) and (not isinstance(scalar(value), str) or not value.isprintable()):
        return DoubleQuotedScalarString(value)
    return value


def _override(document: Document, overrides: Sequence[str]) -> list[tuple[tuple[int, int, int], Problem]]:
    """Set the overrides' values in the document; the problems of those that cannot be set."""
    problems = []
    for number, text in enumerate(overrides):
        place = Location((1, number, 0), f"override {text!r}")
        key, equals, value = text.partition("=")
        try:
            if not equals or not all(key.split(".")):
                raise _NotSet("expected key.path=value", "for example training.lr=3e-4")
            _set(document, key, _value(value), place)
        except _NotSet as error:
            problems.append((place.order, Problem(place.text, key, *error.args)))
    return problems


class _Writer(RoundTripRepresenter):
    """Writes `null` where the library leaves a blank."""


_Writer.add_representer(type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null"))


class _NotSet(Exception):
    """An override cannot be set; the message and the fix."""


def _value(text: str) -> Any:
    """An override's value: a YAML scalar, or a collection in brackets."""
    if not text.strip():
        return None
    try:
        document = read_text(text, "value")
    except RecipeError as error:
        problem = error.problems[0]
        raise _NotSet(problem.message, problem.fix) from error
    if document.mistakes:
        raise _NotSet(document.mistakes[0].message, document.mistakes[0].fix)
    if isinstance(document.data, dict | list) and text.strip()[0] not in "{[":
        raise _NotSet("the value must be a plain value, or a collection in {…} or […]", "put quotes around text")
    return document.data


def _set(document: Document, key: str, value: Any, place: Location) -> None:
    """Put a value at a dotted key, making the sections on the way."""
    path: KeyPath = ()
    parts = key.split(".")
    for depth, part in enumerate(parts):
        parent = at(document.data, path)
        if parent is None:
            document.put(path, {}, place)
        elif isinstance(parent, list):
            if not (part.isdecimal() and int(part) < len(parent)):
                numbers = f"0 to {len(parent) - 1}" if parent else "none"
                raise _NotSet(f"{part!r} is not an item of {'.'.join(parts[:depth])}", f"items are numbered: {numbers}")
        elif not isinstance(parent, dict):
            raise _NotSet(f"{'.'.join(parts[:depth])} is a value, it has no key {part!r}")
        path = (*path, int(part) if isinstance(parent, list) else part)
        if depth < len(parts) - 1 and at(document.data, path) is None:
            document.put(path, {}, place)
    document.put(path, value, place)

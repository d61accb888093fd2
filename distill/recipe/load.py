"""From a file and overrides to a `Recipe`, or to one error with every problem in the order of the file; and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python
from ruamel.yaml import YAML
from ruamel.yaml.representer import SafeRepresenter

from distill.errors import InputError, Problem, RecipeError
from distill.recipe.document import Document, at
from distill.recipe.explain import check_schema, valid_parts
from distill.recipe.fields import KeyPath, Location, dotted
from distill.recipe.headers import look_at_data, look_at_folder, look_at_models
from distill.recipe.locate import teacher_size
from distill.recipe.rules import check_together
from distill.recipe.schema import Recipe
from distill.recipe.task_rules import reader_fits
from distill.recipe.yaml import read_document, read_text, refuse, scalar

Ranked = tuple[tuple[int, int, int], Problem]
"""A problem, and its place in reading order."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check everything that can be known without loading a model.

    Args:
        path: The YAML file. Folders in it are relative to the file.
        overrides: `key.path=value` each, e.g. `losses.0.weight=0.5`; values are YAML. The last of two equal keys holds.

    Raises:
        RecipeError: The recipe is wrong; lists all problems.
        InputError: The file cannot be read.
    """
    return _load(path, overrides, weights=True)


def load_without_weights(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Do what `load_recipe` does for a teacher of which there may be no more than a config and a tokenizer."""
    return _load(path, overrides, weights=False)


def _load(path: str | Path, overrides: Sequence[str], *, weights: bool) -> Recipe:
    path = Path(path)
    document = _read_section(path)
    ranked = _override(document, overrides)
    recipe, mistakes, moved = check_schema(document)
    parts = recipe.parts if recipe else valid_parts(document.data)
    base = path.absolute().parent
    size, own, of_models = look_at_models(parts, base, weights=weights)
    of_data = look_at_data(parts.get("data"), base, parts.get("evaluation"))
    reported = {mistake.path for mistake in mistakes}
    mistakes += [
        each for each in (*of_models, *of_data, *check_together(parts, size, own)) if each.path not in reported
    ]
    mistakes = [each for each in mistakes if not any(each.path[: len(path)] == path for path in moved)]
    return _accept(recipe, ranked + [document.problem(mistake) for mistake in document.mistakes + mistakes])


def read_released(path: Path) -> Recipe:
    """Read the recipe that lies in a release, whose teacher and data may have stayed elsewhere.

    Raises:
        RecipeError: It is no recipe; lists all problems.
        InputError: The file cannot be read.
    """
    document = _read_section(path)
    recipe, mistakes, _ = check_schema(document)
    return _accept(recipe, [document.problem(mistake) for mistake in document.mistakes + mistakes])


def _read_section(path: Path) -> Document:
    document = read_document(path)
    if not isinstance(document.data, dict):
        refuse("a recipe is a section of keys", "start with `name: …`", document.values[()].text)
    return document


def _accept(recipe: Recipe | None, ranked: list[Ranked]) -> Recipe:
    """Return a recipe without problems. Raises RecipeError with all of them, in their order."""
    if recipe is None or ranked:
        raise RecipeError([problem for _, problem in sorted(ranked, key=lambda entry: entry[0])])
    return recipe


def check_teacher(recipe: Recipe, folder: Path) -> None:
    """Check a recipe against a teacher that it was read without: one that had to be downloaded.

    Raises:
        InputError: Its files are those of no teacher, or the recipe does not fit it.
    """
    size, of_teacher = look_at_folder(folder, weights=recipe.teacher.init != "random")
    mistakes = [*of_teacher, *map(str, check_together(recipe.parts, size))]
    if mistakes:
        raise InputError("; ".join(mistakes))


def check_beside(recipe: Recipe, key: str, first: Path, folder: Path) -> None:
    """Check a recipe against a model beside its first teacher that it was read without. Raises InputError."""
    size, (own, found) = teacher_size(first), look_at_folder(folder, weights=True)
    rules = [*reader_fits(recipe.data, size, own, (key,))]
    rules += check_together(recipe.parts, size, own) if key == "student.from" else ()
    if mistakes := [*found, *map(str, rules)]:
        raise InputError("; ".join(mistakes))


def dump(recipe: Recipe, *, defaults: bool = True) -> str:
    """Write the recipe as YAML, with every default or with none; loads back to an equal recipe."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.allow_unicode = False, True
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 2**20  # long text stays on its line
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.Representer = _Writer
    stream = StringIO()
    yaml.dump(recipe.model_dump(mode="json", exclude_defaults=not defaults), stream)
    return stream.getvalue()


class _Writer(SafeRepresenter):
    """Writes lists of plain values on one line, and in quotes what the reader would take for something else.

    The reader decides what needs quotes: the writer's library takes other words for numbers and dates.
    """

    def write_text(self, text: str) -> Any:
        plain = isinstance(scalar(text), str) and text.isprintable()
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')

    def write_list(self, items: list[Any]) -> Any:
        nested = any(isinstance(item, dict) for item in items)
        return self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=not nested)


_Writer.add_representer(str, _Writer.write_text)
_Writer.add_representer(list, _Writer.write_list)


def fingerprint(value: Any) -> str:
    """Hash a section, a dict or a list as canonical JSON (sha256): the order of keys does not matter."""
    text = json.dumps(to_jsonable_python(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _override(document: Document, overrides: Sequence[str]) -> list[Ranked]:
    """Set the overrides' values in the document; return the problems of those that cannot be set."""
    problems = []
    for number, text in enumerate(overrides):
        place = Location((1, number, 0), f"override {text!r}")
        key, equals, value = text.partition("=")
        try:
            if not equals or not all(key.split(".")):
                refuse("expected key.path=value", "for example training.lr=3e-4")
            _set(document, key, _value(value), place)
        except RecipeError as error:
            problems.append((place.order, replace(error.problems[0], where=place.text, key=key)))
    return problems


def _value(text: str) -> Any:
    """Parse an override's value: a YAML scalar, or a collection in brackets."""
    if not text.strip():
        return None
    document = read_text(text, "value")
    for mistake in document.mistakes:
        refuse(mistake.message, mistake.fix)
    if isinstance(document.data, dict | list) and text.strip()[0] not in "{[":
        refuse("the value must be a plain value, or a collection in {…} or […]", "put quotes around text")
    return document.data


def _set(document: Document, key: str, value: Any, place: Location) -> None:
    """Put a value at a dotted key, making the sections on the way."""
    path: KeyPath = ()
    for part in key.split("."):
        if at(document.data, path) is None:
            document.put(path, {}, place)
        parent, above = at(document.data, path), dotted(path)
        if isinstance(parent, list):
            if not (part.isdecimal() and int(part) < len(parent)):
                numbers = f"0 to {len(parent) - 1}" if parent else "none"
                refuse(f"{part!r} is not an item of {above}", f"items are numbered: {numbers}")
        elif not isinstance(parent, dict):
            refuse(f"{above} is a value, it has no key {part!r}")
        path = (*path, int(part) if isinstance(parent, list) else part)
    document.put(path, value, place)

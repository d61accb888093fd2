"""The schema's findings in plain English: what was given, what is allowed, what was probably meant."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from distill.recipe.document import Document, Finding, KeyPath, at, dotted
from distill.recipe.schema import Recipe, json_schema
from distill.registry import nearest

Node = dict[str, Any]
"""A node of the recipe's JSON schema, `$ref` resolved."""

_PATTERNS = {
    "name": "letters, digits, '.', '_' and '-', starting with a letter or digit",
    "teacher.sha256": "64 hexadecimal digits in lower case",
}
_KINDS = {
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "integer": "a whole number",
    "number": "a number",
}
_GIVEN = {bool: "", int: "the number ", float: "the number ", str: "the text ", list: "the list ", dict: "the section "}


def validate(document: Document) -> tuple[Recipe | None, list[Finding]]:
    """Check a document against the schema.

    A misspelt or misplaced key is reported and then put right in the document, so that what it holds is checked too.
    """
    schema = _Schema()
    found: list[Finding] = []
    seen: set[KeyPath] = set()
    while True:
        try:
            return Recipe.model_validate(document.data), found
        except ValidationError as error:
            errors = [(e["type"], e["loc"]) for e in error.errors(include_url=False, include_input=False)]
        unknown = [loc for kind, loc in errors if kind == "extra_forbidden" and loc not in seen]
        if not unknown:
            return None, found + _wrong_values(errors, document, schema)
        for path in unknown:
            seen.add(path)
            finding, meant = _unknown_key(path, document, schema)
            found.append(finding)
            if meant is not None:
                document.move(path, meant)


class _Schema:
    """Walks the recipe's JSON schema, where types, limits and names are data."""

    def __init__(self) -> None:
        self.root = json_schema()

    def resolve(self, node: Node) -> Node:
        reference = node.get("$ref")
        return self.root["$defs"][reference.rpartition("/")[2]] if reference else node

    def options(self, node: Node) -> list[Node]:
        """The alternatives of a node, itself when there are none."""
        node = self.resolve(node)
        return [option for each in node.get("anyOf", []) for option in self.options(each)] or [node]

    def node(self, path: KeyPath) -> Node:
        """What the schema says about a key; empty for a key that it does not know."""
        node = self.root
        for part in path:
            steps = [_step(option, part) for option in self.options(node)]
            node = next((step for step in steps if step), {})
        return self.resolve(node)

    def keys(self, path: KeyPath) -> list[str]:
        """The keys of a section, empty when there is no section at `path`."""
        return [key for option in self.options(self.node(path)) for key in option.get("properties", {})]

    def sections(self, path: KeyPath = ()) -> Iterator[KeyPath]:
        """Every section outside lists, the recipe itself first."""
        yield path
        for key in self.keys(path):
            if self.keys((*path, key)):
                yield from self.sections((*path, key))

    def words(self, node: Node, path: KeyPath = ()) -> str:
        """What is allowed, in words."""
        return " or ".join(dict.fromkeys(self._words(option, path) for option in self.options(node)))

    def _words(self, node: Node, path: KeyPath) -> str:
        if "enum" in node or "const" in node:
            names = node.get("enum", [node.get("const")])
            return f"one of {', '.join(names)}" if len(names) > 1 else str(names[0])
        if "properties" in node:
            return f"a section with the keys {', '.join(node['properties'])}"
        kind = str(node.get("type", ""))
        if kind == "object":
            return "a section of names and values"
        if kind == "array" and "prefixItems" in node:
            return f"[{', '.join(self.words(item) for item in node['prefixItems'])}]"
        if kind == "array":
            return f"a list, each item {self.words(node['items'])}"
        if "pattern" in node:
            return f"text of {_PATTERNS.get(dotted(path), 'the form ' + node['pattern'])}"
        return _KINDS.get(kind, kind) + _limits(node)


def _step(node: Node, part: str | int) -> Node:
    if isinstance(part, str):
        found = node.get("properties", {}).get(part) or node.get("additionalProperties")
    else:
        items = node.get("prefixItems", [])
        found = items[part] if part < len(items) else node.get("items")
    return found if isinstance(found, dict) else {}


def _limits(node: Node) -> str:
    names = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{words} {node[key]:g}" for key, words in names.items() if key in node]
    return f" {' and '.join(limits)}" if limits else ""


def _unknown_key(path: KeyPath, document: Document, schema: _Schema) -> tuple[Finding, KeyPath | None]:
    """The finding for an unknown key, and where it should be when that is clear and free."""
    section, key = path[:-1], str(path[-1])
    siblings = schema.keys(section)
    elsewhere = sorted((other for other in schema.sections() if key in schema.keys(other)), key=len)
    # A close spelling beats a key of another section, which beats a distant spelling.
    close = nearest(key, siblings, 0.8) or (None if elsewhere else nearest(key, siblings))
    meant: KeyPath | None = None
    fix = ""
    if close:
        fix, meant = f"did you mean {close!r}?", (*section, close)
    elif elsewhere:
        fix, meant = f"belongs {_under(elsewhere)}", (*elsewhere[0], key)
    elif key in schema.keys(("losses", 0)):
        fix = "belongs in an item of losses:"
    else:
        fix = f"remove it; {_name(section)} has {', '.join(siblings)}"
    if meant and at(document.data, meant, default=meant) is not meant:
        fix, meant = f"{fix} It is given as well: remove one of them" if close else fix, None
    if meant and not isinstance(at(document.data, meant[:-1]), dict):
        meant = None
    # The place is noted now: once the key is moved, the document knows it under its new path only.
    return Finding(path, "unknown key", fix, at="key", place=document.keys.get(path)), meant


def _under(sections: list[KeyPath]) -> str:
    names = [f"under {dotted(section)}:" if section else "at the top of the recipe" for section in sections]
    return " or ".join(names)


def _name(section: KeyPath) -> str:
    return f"{dotted(section)}:" if section else "a recipe"


def _wrong_values(errors: list[tuple[str, KeyPath]], document: Document, schema: _Schema) -> list[Finding]:
    missing, wrong = [], []
    for kind, loc in errors:
        path = _real_path(loc, document.data)
        # In a pair such as betas, pydantic calls an absent item missing: there the pair is what is wrong.
        if kind == "missing" and isinstance(loc[-1], str):
            missing.append((*path, loc[-1]))
        elif kind != "extra_forbidden":
            wrong.append(path)
    # Where several forms are allowed, each complains; the deepest complaint is about the form that was meant.
    wrong = [path for path in dict.fromkeys(wrong) if not any(_inside(other, path) for other in wrong)]
    return [
        *(Finding(path, f"missing; give {schema.words(schema.node(path), path)}", at="key") for path in missing),
        *(_wrong_value(path, at(document.data, path), schema) for path in wrong),
    ]


def _inside(path: KeyPath, outer: KeyPath) -> bool:
    return len(path) > len(outer) and path[: len(outer)] == outer


def _real_path(loc: KeyPath, data: Any) -> KeyPath:
    """Pydantic's location without the names of union branches, which are not keys of the data."""
    path: KeyPath = ()
    for part in loc:
        if at(data, (*path, part), default=data) is not data:
            path = (*path, part)
    return path


def _wrong_value(path: KeyPath, value: Any, schema: _Schema) -> Finding:
    node = schema.node(path)
    allowed = schema.words(node, path)
    if "minItems" in node and value == []:
        allowed += f", at least {node['minItems']}"
    return Finding(path, f"expected {allowed}, got {shown(value)}", _value_fix(value, schema.options(node)))


def shown(value: Any) -> str:
    """A value as the user wrote it, with its kind where that is the point, cut to fit a line."""
    if value is None:
        return "null (nothing)"
    # Not finite numbers are written as in YAML.
    text = json.dumps(value, ensure_ascii=False).replace("Infinity", ".inf").replace("NaN", ".nan")
    return _GIVEN[type(value)] + (text if len(text) <= 60 else f"{text[:60]}…")


def _value_fix(value: Any, options: list[Node]) -> str:
    kinds = {str(option.get("type")) for option in options}
    if isinstance(value, str):
        names = [name for option in options for name in option.get("enum", [option.get("const")]) if name]
        close = nearest(value, names)
        if close:
            return f"did you mean {close!r}?"
        if "boolean" in kinds and value.lower() in {"yes", "on", "no", "off"}:
            return f"write {'true' if value.lower() in {'yes', 'on'} else 'false'}"
        if "integer" in kinds and value.strip().lstrip("+-").isdecimal():
            return "remove the quotes"
    if isinstance(value, int | float) and not isinstance(value, bool) and "string" in kinds:
        return "put it in quotes"
    if isinstance(value, float) and "integer" in kinds and value.is_integer():
        return f"write {int(value)}"
    return ""

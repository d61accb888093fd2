"""YAML 1.2 read strictly: data and locations only, nothing that could surprise, hang or run.

Refused with file, line and column: duplicate keys, anchors, aliases, merge keys, tags, directives, several documents,
deep nesting, huge files, anything but UTF-8. `ruamel.yaml` does the tokens and the syntax; composing and resolving are
done here, from its events: its loaders would follow an alias before it can be refused, stop at the first repeated key,
and decide by YAML 1.1 what is a date.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML, events
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from distill.errors import InputError, Problem, RecipeError
from distill.recipe.document import Document
from distill.recipe.fields import KeyPath, Location, Mistake, dotted

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_NODES = 20_000
"""Keeps a dense file below the size limit from taking a minute: the parser is pure Python."""

_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_INTEGER = re.compile(r"[-+]?[0-9]{1,300}|0o[0-7]{1,300}|0x[0-9a-fA-F]{1,300}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {word: value for text, value in (("null", None), ("true", True), ("false", False))
          for word in (text, text.title(), text.upper())} | {"": None, "~": None}  # fmt: skip


def read_document(path: Path) -> Document:
    """Read the document in a file. Raises InputError when it cannot be read, RecipeError when it is not strict YAML."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"cannot read the recipe {path}: it is not a regular file")  # a pipe may never end
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror or error}") from error
    if len(content) > MAX_BYTES:
        refuse(f"the file is larger than {MAX_BYTES:,} bytes; a recipe is a page of settings", where=f"{path}:1:1")
    try:
        return read_text(content.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        where = f"{path}:{_line_column(content[: error.start].decode('utf-8-sig'))}"
        refuse(f"byte 0x{content[error.start]:02x} is not UTF-8", "save the file as UTF-8", where)


def read_text(text: str, source: str) -> Document:
    """Read the single document in `text`; `source` is the file name for messages."""
    if bad := _UNPRINTABLE.search(text):
        where = f"{source}:{_line_column(text[: bad.start()])}"
        refuse(f"character U+{ord(bad.group()):04X} is not allowed in YAML", "delete it", where)
    try:
        # A byte order mark within the text is printable to the parser; at the start it was removed on decoding.
        return _Composer(source, YAML(typ="safe", pure=True).parse(text)).document()
    except RecipeError:  # a ValueError, too
        raise
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason, fix = " ".join(filter(None, (error.problem, error.context))), ""
        if text[mark.index : mark.index + 1] == "\t":
            reason, fix = "a tab stands where YAML wants spaces", "replace it with spaces"
        elif error.problem == "mapping values are not allowed here":
            reason = "a `:` is not allowed here"
            fix = "check the indentation, or put quotes around text that holds `: `"
        elif (error.problem or "").startswith("expected <block end>"):
            reason, fix = "this line is indented unlike those above", "indent it as the section that it belongs to"
        refuse(f"not valid YAML: {reason}", fix, f"{source}:{mark.line + 1}:{mark.column + 1}")
    except (YAMLError, ValueError, OverflowError) as error:
        # Escapes of characters that do not exist ("\ud800") break inside the parser, without a position.
        fix = 'look for escapes such as "\\ud800"'
        refuse(f"not valid YAML: {str(error).splitlines()[0]}", fix, f"{source}:1:1")


def scalar(text: str) -> str | int | float | bool | None:
    """Read an unquoted value by YAML 1.2's core schema: `no` and `2026-01-01` are text, `1e-4` is a number."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text, base=0 if text[1:2] in ("o", "x") else 10)
    return float(text.replace(".inf", "inf").replace(".nan", "nan")) if _FLOAT.fullmatch(text) else text


def refuse(message: str, fix: str = "", where: str = "", key: str = "recipe") -> NoReturn:
    """Raise a RecipeError with one problem."""
    raise RecipeError([Problem(where, key, message, fix)])


class _Composer:
    """Builds the data event by event; refuses at the first thing that is not plain data."""

    def __init__(self, source: str, parsed: Iterator[Any]):
        self.source, self.events = source, parsed
        self.result = Document(None)
        self.nodes = 0

    def document(self) -> Document:
        next(self.events)  # start of the stream
        event = next(self.events)
        if isinstance(event, events.StreamEndEvent):
            refuse("the file is empty", "start with `name:`; `distill schema` lists every key", f"{self.source}:1:1")
        if event.version or event.tags:
            self._refuse(event, (), "%YAML and %TAG directives are not allowed", "delete the line")
        self.result.keys[()] = self._location(event)
        self.result.data = self._node(next(self.events), ())
        next(self.events)  # end of the document
        event = next(self.events)
        if not isinstance(event, events.StreamEndEvent):
            self._refuse(event, (), "a second document starts here", "keep one recipe per file and delete the `---`")
        return self.result

    def _node(self, event: Any, path: KeyPath) -> Any:
        self._check(event, path)
        written = isinstance(event, events.CollectionStartEvent) or event.value or event.style
        # Where nothing was written, the parser places that at the next token, which may be lines below.
        self.result.values[path] = self._location(event) if written else self.result.keys[path]
        if isinstance(event, events.MappingStartEvent):
            return self._mapping(path)
        if isinstance(event, events.SequenceStartEvent):
            return self._sequence(path)
        return scalar(event.value) if event.style is None else event.value

    def _check(self, event: Any, path: KeyPath) -> None:
        if isinstance(event, events.AliasEvent):
            self._refuse(event, path, f"the alias *{event.anchor} is not allowed", "write the value out again")
        if event.anchor is not None:
            self._refuse(event, path, f"the anchor &{event.anchor} is not allowed", "write the value where it is used")
        if event.tag is not None:
            self._refuse(event, path, f"the tag {event.tag} is not allowed", "write the plain value")
        if len(path) >= MAX_DEPTH:
            # The path itself would fill a screen.
            self._refuse(event, path[:1], f"nested more than {MAX_DEPTH} levels deep")
        self.nodes += 1
        if self.nodes > MAX_NODES:
            self._refuse(event, path[:1], f"more than {MAX_NODES:,} values; a recipe is a page of settings")
        if bad := _CONTROL.search(getattr(event, "value", None) or ""):  # "\0" and the like, written as an escape
            self._refuse(event, path, f"the text holds the control character U+{ord(bad.group()):04X}", "remove it")

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        while not isinstance(event := next(self.events), events.MappingEndEvent):
            self._check(event, path)
            if not isinstance(event, events.ScalarEvent):
                self._refuse(event, path, "a key must be plain text")
            own, location, kept = (*path, event.value), self._location(event), self.result
            if event.value == "<<" and event.style is None:
                self._refuse(event, path, "the merge key << is not allowed", "write the keys out")
            if event.value in mapping:
                message = f"given twice in this section, first on line {kept.keys[own].order[1]}"
                kept.mistakes.append(Mistake(own, message, "keep one of them", location=location))
                self.result = Document(None)  # the value is read, strictly, and forgotten
            self.result.keys[own] = location
            value = self._node(next(self.events), own)
            mapping.setdefault(event.value, value)
            self.result = kept
        return mapping

    def _sequence(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), events.SequenceEndEvent):
            own = (*path, len(items))
            self.result.keys[own] = self._location(event)
            items.append(self._node(event, own))
        return items

    def _location(self, event: Any) -> Location:
        line, column = event.start_mark.line + 1, event.start_mark.column + 1
        return Location((0, line, column), f"{self.source}:{line}:{column}")

    def _refuse(self, event: Any, path: KeyPath, message: str, fix: str = "") -> NoReturn:
        refuse(message, fix, self._location(event).text, dotted(path))


def _line_column(before: str) -> str:
    lines = re.split("\r\n|[\r\n\x85\u2028\u2029]", before)
    return f"{len(lines)}:{len(lines[-1]) + 1}"

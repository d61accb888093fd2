"""YAML 1.2 read strictly: data and places only, nothing that could surprise, hang or run.

Refused with file, line and column: duplicate keys, anchors, aliases, merge keys, tags, directives, several documents,
deep nesting, huge files, anything but UTF-8. `ruamel.yaml` does the tokens and the syntax; composing and resolving are
done here, so that no library default (YAML 1.1 booleans, base-60 integers, dates) decides what a value is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML, events
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from distill.errors import InputError, Problem, RecipeError
from distill.recipe.document import Document, Finding, KeyPath, Place, dotted

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_NODES = 20_000
"""Keeps a dense file below the size limit from taking a minute: the parser is pure Python."""

_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_INTEGER = re.compile(r"[-+]?[0-9]{1,300}")
_BASED = re.compile(r"0o[0-7]{1,300}|0x[0-9a-fA-F]{1,300}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, bool | float | None] = {
    **dict.fromkeys(["", "~", "null", "Null", "NULL"]),
    **dict.fromkeys(["true", "True", "TRUE"], True),
    **dict.fromkeys(["false", "False", "FALSE"], False),
    **dict.fromkeys([".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"], float("inf")),
    **dict.fromkeys(["-.inf", "-.Inf", "-.INF"], float("-inf")),
    **dict.fromkeys([".nan", ".NaN", ".NAN"], float("nan")),
}


def read_file(path: Path) -> Document:
    """The document in a file. Raises InputError when it cannot be read, RecipeError when it is not strict YAML."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the recipe {path}: {reason}") from error
    if len(content) > MAX_BYTES:
        _refuse(f"{path}:1:1", f"the file is larger than {MAX_BYTES:,} bytes; a recipe is a page of settings")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8-sig")
        message = f"byte 0x{content[error.start]:02x} is not UTF-8"
        _refuse(f"{path}:{_line_column(before)}", message, "save the file as UTF-8")
    return read_text(text, str(path))


def read_text(text: str, source: str) -> Document:
    """The single document in `text`; `source` is the file name for messages."""
    bad = _UNPRINTABLE.search(text)
    if bad:
        message = f"character U+{ord(bad.group()):04X} is not allowed in YAML"
        _refuse(f"{source}:{_line_column(text[: bad.start()])}", message, "delete it")
    return _Composer(text, source).document()


def scalar(text: str) -> str | int | float | bool | None:
    """An unquoted value by YAML 1.2's core schema: `no`, `12:30:00` and `2026-01-01` are text, `1e-4` is a number."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, base=0)
    return float(text) if _FLOAT.fullmatch(text) else text


class _Composer:
    """Builds the data event by event; refuses at the first thing that is not plain data."""

    def __init__(self, text: str, source: str):
        self.text, self.source = text, source
        self.result = Document(None)
        self.nodes = 0
        # A byte order mark within the text is printable to the parser; at the start it was removed on decoding.
        self.events: Iterator[Any] = YAML(typ="safe", pure=True).parse(text)

    def document(self) -> Document:
        try:
            self._document()
        except MarkedYAMLError as error:
            self._syntax_error(error)
        except RecipeError:  # a ValueError, too
            raise
        except (YAMLError, ValueError, OverflowError) as error:
            # Escapes of characters that do not exist ("\ud800") break inside the parser, without a position.
            reason = str(error).splitlines()[0]
            _refuse(f"{self.source}:1:1", f"not valid YAML: {reason}", 'look for escapes such as "\\ud800"')
        return self.result

    def _document(self) -> None:
        next(self.events)  # start of the stream
        event = next(self.events)
        if isinstance(event, events.StreamEndEvent):
            _refuse(f"{self.source}:1:1", "the file is empty", "start with `name:`; `distill schema` lists every key")
        if event.version or event.tags:
            self._refuse(event, (), "%YAML and %TAG directives are not allowed", "delete the line")
        self.result.keys[()] = self._place(event)
        self.result.data = self._node(next(self.events), ())
        next(self.events)  # end of the document
        event = next(self.events)
        if not isinstance(event, events.StreamEndEvent):
            self._refuse(event, (), "a second document starts here", "keep one recipe per file and delete the `---`")

    def _node(self, event: Any, path: KeyPath) -> Any:
        self._check(event, path)
        self.result.values[path] = self._place(event)
        if isinstance(event, events.ScalarEvent):
            if event.value == "" and event.style is None and path in self.result.keys:
                # Nothing was written: the parser places that at the next token, which may be lines below.
                self.result.values[path] = self.result.keys[path]
            return self._text(event, path)
        return self._mapping(path) if isinstance(event, events.MappingStartEvent) else self._sequence(path)

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

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        while not isinstance(event := next(self.events), events.MappingEndEvent):
            if not isinstance(event, events.ScalarEvent):
                self._check(event, path)
                self._refuse(event, path, "a key must be plain text")
            self._check(event, path)
            key = self._text(event, path, resolve=False)
            own = (*path, key)
            if key == "<<" and event.style is None:
                self._refuse(event, path, "the merge key << is not allowed", "write the keys out")
            if key in mapping:
                message = f"given twice in this section, first on line {self.result.keys[own].order[1]}"
                self.result.findings.append(Finding(own, message, "keep one of them", place=self._place(event)))
                self._skip(own)
                continue
            self.result.keys[own] = self._place(event)
            mapping[key] = self._node(next(self.events), own)
        return mapping

    def _sequence(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), events.SequenceEndEvent):
            own = (*path, len(items))
            self.result.keys[own] = self._place(event)
            items.append(self._node(event, own))
        return items

    def _skip(self, path: KeyPath) -> None:
        """Read the value of a repeated key, strictly, and forget it."""
        kept = self.result
        self.result = Document(None)
        self._node(next(self.events), path)
        self.result = kept

    def _text(self, event: Any, path: KeyPath, resolve: bool = True) -> Any:
        text = str(event.value)
        bad = re.search("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", text)  # "\0" and the like, written as an escape
        if bad:
            self._refuse(event, path, f"the text holds the control character U+{ord(bad.group()):04X}", "remove it")
        return scalar(text) if resolve and event.style is None else text

    def _syntax_error(self, error: MarkedYAMLError) -> NoReturn:
        mark = error.problem_mark or error.context_mark
        reason, fix = " ".join(filter(None, (error.problem, error.context))), ""
        if self.text[mark.index : mark.index + 1] == "\t":
            reason, fix = "a tab stands where YAML wants spaces", "replace it with spaces"
        elif error.problem == "mapping values are not allowed here":
            reason, fix = (
                "a `:` is not allowed here",
                "check the indentation, or put quotes around text that holds `: `",
            )
        _refuse(f"{self.source}:{mark.line + 1}:{mark.column + 1}", f"not valid YAML: {reason}", fix)

    def _place(self, event: Any) -> Place:
        line, column = event.start_mark.line + 1, event.start_mark.column + 1
        return Place((0, line, column), f"{self.source}:{line}:{column}")

    def _refuse(self, event: Any, path: KeyPath, message: str, fix: str = "") -> NoReturn:
        _refuse(self._place(event).text, message, fix, dotted(path))


def _refuse(where: str, message: str, fix: str = "", key: str = "recipe") -> NoReturn:
    raise RecipeError([Problem(where, key, message, fix)])


def _line_column(before: str) -> str:
    lines = re.split("\r\n|[\r\n\x85\u2028\u2029]", before)
    return f"{len(lines)}:{len(lines[-1]) + 1}"

"""A recipe as it was written: plain data that remembers where each key and value stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from distill.errors import Problem

KeyPath = tuple[str | int, ...]
"""Where something is in the data: `("losses", 0, "weight")`."""


def dotted(path: KeyPath) -> str:
    """`losses.0.weight`; the recipe as a whole is `recipe`."""
    return ".".join(map(str, path)) or "recipe"


def at(data: Any, path: KeyPath, default: Any = None) -> Any:
    """The value at `path`, or `default` where the data has no such key or is of another shape."""
    for part in path:
        if isinstance(data, dict):
            if part not in data:
                return default
        elif not (isinstance(data, list) and isinstance(part, int) and 0 <= part < len(data)):
            return default
        data = data[part]
    return data


class Place(NamedTuple):
    """Where a key or a value was written; places sort in reading order, overrides after the file."""

    order: tuple[int, int, int]
    text: str
    """`file:line:column`, or `override 'key=value'`."""


@dataclass(frozen=True)
class Finding:
    """Something wrong at a key, not yet tied to a line."""

    path: KeyPath
    message: str
    fix: str = ""
    at: Literal["key", "value"] = "value"
    """Point to the key itself (it is unknown, it lacks something) or to its value."""
    place: Place | None = None
    """Known beforehand, for what is not in the data: the second of two equal keys."""


@dataclass
class Document:
    """Parsed data, the places of its parts, and what the parser had to complain about."""

    data: Any
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def problem(self, finding: Finding) -> tuple[tuple[int, int, int], Problem]:
        """The finding as the user reads it, with its rank in reading order."""
        place = finding.place or self._place(finding)
        return place.order, Problem(place.text, dotted(finding.path), finding.message, finding.fix)

    def put(self, path: KeyPath, value: Any, place: Place) -> None:
        """Set a value given elsewhere. The parent of `path` must exist."""
        for places in (self.keys, self.values):
            for known in [known for known in places if known[: len(path)] == path]:
                del places[known]
        at(self.data, path[:-1])[path[-1]] = value
        self.keys[path] = self.values[path] = place

    def move(self, source: KeyPath, target: KeyPath) -> None:
        """Rename a key, or move it into another section, and keep its place."""
        at(self.data, target[:-1])[target[-1]] = at(self.data, source[:-1]).pop(source[-1])
        for places in (self.keys, self.values):
            for known in [known for known in places if known[: len(source)] == source]:
                places[target + known[len(source) :]] = places.pop(known)

    def _place(self, finding: Finding) -> Place:
        places = self.keys if finding.at == "key" else self.values
        # What is missing has no place of its own: the section around it has.
        for length in range(len(finding.path), -1, -1):
            path = finding.path[:length]
            if path in places:
                return places[path]
            places = self.keys
        raise AssertionError("the document itself has no place")

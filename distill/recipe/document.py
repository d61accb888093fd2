"""A recipe as it was written: plain data that remembers where each key and value stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distill.errors import Problem
from distill.recipe.fields import KeyPath, Location, Mistake, dotted


def at(data: Any, path: KeyPath, default: Any = None) -> Any:
    """Get the value at `path`, or `default` where the data has no such key or is of another shape."""
    for part in path:
        is_item = isinstance(data, list) and isinstance(part, int) and 0 <= part < len(data)
        if not is_item and not (isinstance(data, dict) and part in data):
            return default
        data = data[part]
    return data


@dataclass
class Document:
    """Parsed data, the locations of its parts, and what the parser had to complain about."""

    data: Any
    keys: dict[KeyPath, Location] = field(default_factory=dict)
    values: dict[KeyPath, Location] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)

    def problem(self, mistake: Mistake) -> tuple[tuple[int, int, int], Problem]:
        """Give the mistake its place, as text for the user and in reading order."""
        location = mistake.location or self._location(mistake)
        return location.order, Problem(location.text, dotted(mistake.path), mistake.message, mistake.fix)

    def put(self, path: KeyPath, value: Any, location: Location) -> None:
        """Set a value given elsewhere. The parent of `path` must exist."""
        for locations in (self.keys, self.values):
            for known in [known for known in locations if known[: len(path)] == path]:
                del locations[known]
        at(self.data, path[:-1])[path[-1]] = value
        self.keys[path] = self.values[path] = location

    def move(self, source: KeyPath, target: KeyPath) -> None:
        """Rename a key, or move it into another section, and keep its location."""
        at(self.data, target[:-1])[target[-1]] = at(self.data, source[:-1]).pop(source[-1])
        for locations in (self.keys, self.values):
            for known in [known for known in locations if known[: len(source)] == source]:
                locations[target + known[len(source) :]] = locations.pop(known)

    def _location(self, mistake: Mistake) -> Location:
        if mistake.at == "value" and mistake.path in self.values:
            return self.values[mistake.path]
        # What is missing has no location of its own: the section around it has.
        lengths = range(len(mistake.path), -1, -1)
        return next(self.keys[mistake.path[:length]] for length in lengths if mistake.path[:length] in self.keys)

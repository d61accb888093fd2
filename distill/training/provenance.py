"""Compare what a result was made from, kept as flat dotted keys, with what it would be made from now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic_core import to_jsonable_python

NAMED = 6
"""Keys that a message names; the others are counted."""
ABSENT = "absent"


def flatten(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested inputs to dotted keys with JSON values, e.g. `training.lr`, `losses.0.weight`."""
    return dict(_flattened(to_jsonable_python(inputs), ""))


def _flattened(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        yield prefix.removesuffix("."), value
        return
    for key, item in items:
        yield from _flattened(item, f"{prefix}{key}.")


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the dotted keys whose values differ, in the order of `now`."""
    return [key for key in {**now, **before} if before.get(key, ABSENT) != now.get(key, ABSENT)]


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the keys that differ, from what to what: `training.steps: 40 → 60, data: other content`."""
    keys = changed_keys(before, now)
    named = []
    for key in keys[:NAMED]:
        old, new = before.get(key, ABSENT), now.get(key, ABSENT)
        hashes = all(isinstance(value, str) and len(value) == 64 for value in (old, new))
        named.append(f"{key}: other content" if hashes else f"{key}: {old} → {new}")
    more = [f"{len(keys) - NAMED} more"] if len(keys) > NAMED else []
    return ", ".join(named + more)

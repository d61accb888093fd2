"""A table of finished text, for terminal, card and report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Table:
    """Rows of finished text."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    text_columns: int = 1
    """The first columns hold text, the others numbers."""


class Printed(NamedTuple):
    """A table as the command line prints it."""

    title: str
    table: Table
    note: str
    """What to know about it, in the lines below."""

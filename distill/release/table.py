"""A table of finished text, for terminal, card and report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of finished text."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    text_columns: int = 1
    """The first columns hold text, the others numbers."""

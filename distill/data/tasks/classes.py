"""Classes by name and by number: their order, and the number that a label stands for."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from distill.errors import InputError
from distill.recipe.jsonrows import list_names, quote_names

CROWDED = 0.5
"""Share of the labelled rows above which the number of classes says that labels are no classes."""
_DIGITS = re.compile(r"\d{1,9}(\.0*)?", re.ASCII)
"""Whole numbers, also as pandas writes them in a column that lacks some."""
_JOINED = re.compile(r"\s*[|;,]\s*")
_FOREIGN = re.compile(r"([BIESLU])(?:[-_:/](.+))?|(.+)[-_:/]([BIESLU])", re.DOTALL | re.IGNORECASE)
"""Tags that say where in a span a word is, in other forms than B-PER, or that say nothing else."""
_NOTHING = re.compile(r"-1|[!-/:-@\[-`{-~]+")


def order_classes(found: Collection[Any], stated: Sequence[Any] | None) -> tuple[str, ...]:
    """Return the names of the classes by index.

    Args:
        found: Labels of the data: text, whole numbers, true or false.
        stated: `data.classes` of the recipe, which decides where it is given. Labels that are whole numbers may also be
            places in that list, from 0.

    Raises:
        InputError: A label is not in the stated list.
    """
    names = {str(label) for label in found}
    if stated is None:
        return tuple(sorted(names, key=float if are_numbers(names) else None))
    order = tuple(str(each) for each in stated)
    if len(set(order)) < len(order):
        raise InputError(f"data.classes: a name is listed twice: {list_names(order)}")
    if not names <= set(order) and not (names.isdisjoint(order) and are_numbers(names, below=len(order))):
        counted = "; numbers count from 0" if are_numbers(names) else ""
        raise InputError(
            f"data.classes: the data have {list_names(sorted(names - set(order)))}, which the list does not; it has "
            f"{list_names(order)}{counted}"
        )
    return order


def check_count(classes: Sequence[str], labels: int, stated: Sequence[Any] | None) -> None:
    """Refuse a single class, and so many for the labels that these cannot be classes. Raises InputError."""
    if len(classes) < 2:
        raise InputError(f"data: there must be two or more classes, found {list(classes)}")
    if stated is None and len(classes) > max(2, CROWDED * labels):
        raise InputError(
            f"data: {len(classes)} classes for {labels} labels, e.g. {list_names(classes[:3])}: these are "
            f"no classes; write decimal numbers as such (3.0), and check data.columns"
        )


def doubts_about(classes: Sequence[str]) -> str:
    """Name classes that may be several in one, or stand for no label; empty where none reads like that."""
    parts = {name: {*filter(None, _JOINED.split(name))} for name in classes}
    often = Counter(part for own in parts.values() for part in own)
    several = [name for name, own in parts.items() if len(own) > 1 and all(often[part] > 1 for part in own)]
    nothing = [name for name in classes if _NOTHING.fullmatch(name)]
    said = f'; {quote_names(several)} may be several in one: sets are lists, as in ["a", "b"]' if several else ""
    return said + (f"; {quote_names(nothing)} is a class too: where there is none, leave it empty" if nothing else "")


def foreign_kind(tags: Collection[str]) -> str | None:
    """Find a kind of spans where all tags have another form than B-PER and I-PER, as b-per, PER_B or B alone."""
    matches = [_FOREIGN.fullmatch(tag) for tag in tags]
    found = {(tag[2] or tag[3] or "SPAN", (tag[1] or tag[4]).upper()) for tag in matches if tag}
    kinds = sorted(kind for kind, place in found if place == "B" and {(kind, each) for each in "IEL"} & found)
    return kinds[0] if kinds and all(matches) else None


def folded(name: str) -> str:
    """Write a name without what people write differently or do not see: case, spaces, forms of a letter, joiners."""
    seen = (sign for sign in unicodedata.normalize("NFKC", name) if unicodedata.category(sign) != "Cf")
    return " ".join("".join(seen).split()).casefold()


def are_numbers(names: Collection[str], below: int | None = None) -> bool:
    """Tell whether all names are whole numbers from 0, less than `below`."""
    return all(_DIGITS.fullmatch(name) and (below is None or float(name) < below) for name in names)


def class_numbers(classes: Sequence[str]) -> Callable[[Any], int]:
    """Make label -> index of its class; one that is no name is the index itself."""
    index = {name: number for number, name in enumerate(classes)}

    def number_of(label: Any) -> int:
        name = str(label)
        return index[name] if name in index else int(float(name))

    return number_of

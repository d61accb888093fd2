"""Classes by name and by number: their order, and the number that a label stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from distill.errors import InputError
from distill.recipe.jsonrows import list_names

_DIGITS = re.compile(r"\d{1,9}", re.ASCII)


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
        return tuple(sorted(names, key=int if are_numbers(names) else None))
    order = tuple(str(each) for each in stated)
    if len(set(order)) < len(order):
        raise InputError(f"data.classes: a name is listed twice: {list_names(order)}")
    if not names <= set(order) and not (names.isdisjoint(order) and are_numbers(names, below=len(order))):
        raise InputError(
            f"data.classes: the data have {list_names(sorted(names - set(order)))}, which the list does not; it has "
            f"{list_names(order)}"
        )
    return order


def are_numbers(names: Collection[str], below: int | None = None) -> bool:
    """Tell whether all names are whole numbers from 0, less than `below`."""
    return all(_DIGITS.fullmatch(name) and (below is None or int(name) < below) for name in names)


def class_numbers(classes: Sequence[str]) -> Callable[[Any], int]:
    """Make label -> index of its class; one that is no name is the index itself."""
    index = {name: number for number, name in enumerate(classes)}

    def number_of(label: Any) -> int:
        name = str(label)
        return index[name] if name in index else int(name)

    return number_of

"""Rules of `student.mask`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distill.recipe.checks import View, defaults, number
from distill.recipe.document import Finding, KeyPath, at
from distill.recipe.schema import Mask, Release

PATH: KeyPath = ("student", "mask")


def _mask(view: View) -> dict[str, Any] | None:
    return view.section(PATH, Mask) if isinstance(at(view.data, PATH), dict) else None


def amount_is_given_once(view: View) -> Iterator[Finding]:
    """How much is masked is said by `sparsity` or by `threshold`."""
    mask = _mask(view)
    if not mask:
        return
    given = [key for key in ("sparsity", "threshold") if mask[key] is not None]
    if not given:
        yield Finding(PATH, "how much is not said: neither sparsity nor threshold is given", "add one", at="key")
    if len(given) == 2:
        message = "sparsity and threshold are both given, and only one can hold"
        yield Finding((*PATH, "threshold"), message, "remove one, or set it to null", at="key")


def threshold_has_a_measure(view: View) -> Iterator[Finding]:
    """A threshold cuts where weights are small; random scores say nothing about that."""
    mask = _mask(view)
    if mask and mask["threshold"] is not None and mask["score"] == "random":
        message = "has no meaning with score: random, whose scores have no size"
        yield Finding((*PATH, "threshold"), message, "give sparsity", at="key")


def schedule_keys_have_effect(view: View) -> Iterator[Finding]:
    """`end` and `every` are for `cubic`, which needs time between `begin` and `end`."""
    mask = _mask(view)
    if not mask:
        return
    for key in ("end", "every") if mask["schedule"] == "one_shot" else ():
        if mask[key] != defaults(Mask)[key]:
            message = "has no effect with schedule: one_shot"
            yield Finding((*PATH, key), message, "remove it, or write schedule: cubic", at="key")
    begin, end = number(mask["begin"]), number(mask["end"])
    if mask["schedule"] == "cubic" and begin is not None and end is not None and not begin < end:
        yield Finding(
            (*PATH, "begin"), f"begins at {begin:g} of the steps, the end is at {end:g}", "begin before the end"
        )


def compact_fits_the_release(view: View) -> Iterator[Finding]:
    """Widths that may come out different are for a release format that can hold them."""
    mask, release = _mask(view), view.section(("release",), Release)
    if mask and release and mask["compact"] is True and release["format"] == "uniform":
        message = "layers may lose different numbers of neurons, and release.format uniform holds one width"
        yield Finding((*PATH, "compact"), message, "write compact: uniform, or choose another release.format")


MASK_CHECKS: list[Callable[[View], Iterable[Finding]]] = [
    amount_is_given_once,
    threshold_has_a_measure,
    schedule_keys_have_effect,
    compact_fits_the_release,
]

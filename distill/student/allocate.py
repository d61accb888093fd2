"""How the neuron budget is spread over layers: `(scores, keep, multiple_of) -> widths`, one per kept layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from distill.errors import InputError


def uniform(scores: list[Tensor], keep: int | float, multiple_of: int) -> list[int]:
    """The same width for every layer, rounded down to a multiple: the form that stock loaders read.

    Args:
        scores: [F] for each kept layer.
        keep: Neurons per layer, or the share of them.
        multiple_of: Widths below F are multiples of this; keeping everything is always allowed.

    Raises:
        InputError: The width would be above F, or 0 after rounding down.
    """
    return [_width(score.shape[-1], keep, multiple_of) for score in scores]


def _width(full: int, keep: int | float, multiple_of: int) -> int:
    # A share is taken of the full width; 1e-9 keeps 0.7 * 10 from falling to 6 by rounding error.
    asked = int(keep * full + 1e-9) if isinstance(keep, float) else keep
    if asked > full:
        raise InputError(f"student.mlp.keep: {asked} neurons asked, the teacher's MLP has {full}")
    if asked == full:
        return full
    width = asked - asked % multiple_of
    if width == 0:
        raise InputError(
            f"student.mlp.keep: {asked} of {full} neurons rounds down to 0 with multiple_of {multiple_of}; "
            f"keep at least {multiple_of} or lower multiple_of"
        )
    return width


ALLOCATIONS: dict[str, Callable[..., list[int]]] = {"uniform": uniform}

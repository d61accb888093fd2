"""Allocations of the neuron budget: `(scores, asked, influence, **own) -> neurons wanted in each layer`.

`scores` are [F] for each layer that may be cut (of experts: the mean over experts of each one's sorted scores), `asked`
what `student.mlp.keep` means for each layer, `influence` the layers' Block Influence, or None without calibration. What
an allocation wants need not be whole: `layer_widths` rounds it, for all of them alike.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from distill.errors import InputError
from distill.recipe.schema import Mlp
from distill.registry import bind, find

SHARES_BUDGET = {"global", "sensitivity"}
"""Allocations that spread one sum over all layers; the others want something of each layer."""

EXACT = 1e-9
"""Keeps 0.7 * 10 from falling to 6 by rounding error."""


def uniform(_scores: list[Tensor], asked: list[float], _influence: list[float] | None) -> list[float]:
    """The same share of every layer: the form that stock loaders read."""
    return asked


def threshold(
    scores: list[Tensor],
    _asked: list[float],
    _influence: list[float] | None,
    *,
    threshold: float | None = None,
    mass: float | None = None,
) -> list[float]:
    """As many neurons of each layer as its scores ask for.

    `threshold`: neurons whose score is at least so many times the layer's mean score. `mass`: as few neurons, the best,
    as hold this share of the layer's sum of scores.

    Raises:
        InputError: `mass` is no share, or a score is negative.
    """
    if mass is not None and not 0 < mass <= 1:
        raise InputError(f"student.mlp.allocate_params.mass: {mass} is not above 0 and at most 1")
    if any(bool((layer < 0).any()) for layer in scores):
        raise InputError("student.mlp.allocate: `threshold` needs scores that are not negative")
    if threshold is not None:
        return [float((layer >= threshold * layer.mean()).sum()) for layer in scores]
    totals = [layer.sort(descending=True).values.cumsum(0) for layer in scores]
    return [float((total < (mass or 0) * total[-1] * (1 - EXACT)).sum() + 1) for total in totals]


def spread_globally(scores: list[Tensor], asked: list[float], _influence: list[float] | None) -> list[float]:
    """One ranking over all layers of scores that are standardised within each layer, (x - mean) / std.

    Neurons that tie at the edge of the budget are taken from each layer in proportion. Source: the AL-AM structure of
    FLAP (An et al. 2023, arXiv 2312.11983).
    """
    budget = sum(asked)
    ranked = [_standardise(layer) for layer in scores]
    ordered = torch.cat(ranked).sort(descending=True).values
    edge = ordered[min(len(ordered), max(1, int(budget + EXACT))) - 1]
    above = [float((layer > edge).sum()) for layer in ranked]
    ties = [float((layer == edge).sum()) for layer in ranked]
    share = (budget - sum(above)) / sum(ties)
    return [over + share * tied for over, tied in zip(above, ties, strict=True)]


def sensitivity(
    _scores: list[Tensor], asked: list[float], influence: list[float] | None, *, strength: float = 0.5
) -> list[float]:
    """Layers that change their input more keep more: asked · (1 + strength · (influence / mean influence - 1)).

    With `strength` 0 this is `uniform`; with 1 a layer's share is in proportion to its Block Influence.

    Raises:
        InputError: No calibration, or `strength` outside 0 to 1.
    """
    if influence is None:
        raise InputError("student.mlp.allocate: `sensitivity` needs calibration data")
    if not 0 <= strength <= 1:
        raise InputError(f"student.mlp.allocate_params.strength: {strength} is not between 0 and 1")
    mean = max(sum(influence) / len(influence), EXACT)
    return [wanted * (1 + strength * (change / mean - 1)) for wanted, change in zip(asked, influence, strict=True)]


def _standardise(scores: Tensor) -> Tensor:
    deviation = scores.double().std(correction=0)
    if deviation <= 1e-12 * scores.abs().max():  # all equal but for rounding
        return torch.zeros_like(scores, dtype=torch.float64)
    return (scores.double() - scores.double().mean()) / deviation


ALLOCATIONS: dict[str, Callable[..., list[float]]] = {
    "uniform": uniform,
    "threshold": threshold,
    "global": spread_globally,
    "sensitivity": sensitivity,
}


def layer_widths(
    scores: list[Tensor],
    mlp: Mlp,
    keep: int | float | Sequence[int | float],
    influence: list[float] | None,
    whole: list[bool],
) -> list[int]:
    """Compute the width of each layer: a multiple of `multiple_of` or the teacher's, and never above the teacher's.

    Widths are rounded down; a shared budget is met within one multiple.

    Args:
        scores: [F] for each kept layer.
        mlp: The recipe's section.
        keep: In place of `mlp.keep`, which a target may not have said.
        influence: Block Influence of each kept layer.
        whole: True for layers that keep all their neurons; they are not part of the budget.

    Raises:
        InputError: A width above the teacher's, none after rounding down, or a floor that the budget cannot give.
    """
    full = [len(layer) for layer in scores]
    keeps = list(keep) if isinstance(keep, Sequence) else [keep] * len(full)
    if len(keeps) != len(full):
        raise InputError(f"student.mlp.keep: {len(keeps)} widths for {len(full)} kept layers")
    free = [index for index, stays in enumerate(whole) if not stays]
    if not free:
        return full
    widest, asked = [full[index] for index in free], [_neurons_asked(keeps[index], full[index]) for index in free]
    floors = [floor_width(mlp, size) for size in widest]
    wanted = asked if isinstance(keep, Sequence) else _allocate(scores, free, asked, mlp, influence)
    if mlp.allocate in SHARES_BUDGET:
        got = _spend_budget(wanted, floors, widest, mlp.multiple_of, int(sum(asked) + EXACT))
    elif mlp.allocate == "threshold":
        sizes = zip(wanted, widest, floors, strict=True)
        got = [max(least, round_down(width, size, mlp.multiple_of)) for width, size, least in sizes]
    else:
        got = [_round_alone(width, size, mlp) for width, size in zip(wanted, widest, strict=True)]
    chosen = dict(zip(free, got, strict=True))
    return [chosen.get(index, size) for index, size in enumerate(full)]


def _allocate(
    scores: list[Tensor], free: list[int], asked: list[float], mlp: Mlp, influence: list[float] | None
) -> list[float]:
    spread = bind(find(ALLOCATIONS, mlp.allocate, "allocation"), mlp.allocate_params, "student.mlp.allocate_params")
    changes = None if influence is None else [influence[index] for index in free]
    found = spread([scores[index] for index in free], asked, changes)
    wanted = [float(number) for number in found] if isinstance(found, Iterable) else []
    if len(wanted) != len(free) or not all(0 <= number < torch.inf for number in wanted):
        raise InputError(
            f"student.mlp.allocate: {mlp.allocate} returned {found}, not a number of neurons for each of the "
            f"{len(free)} layers that may be cut"
        )
    return wanted


def _neurons_asked(keep: int | float, full: int) -> float:
    if isinstance(keep, float):
        return keep * full
    if keep > full:
        raise InputError(f"student.mlp.keep: {keep} neurons asked, the teacher's MLP has {full}")
    return float(keep)


def round_down(wanted: float, full: int, multiple: int) -> int:
    """Round to the largest width of at most `wanted` neurons that is a multiple, or is the teacher's."""
    whole = int(wanted + EXACT)
    return full if whole >= full else whole - whole % multiple


def floor_width(mlp: Mlp, full: int) -> int:
    """The smallest width that a layer may have."""
    asked = 1 if mlp.floor is None else mlp.floor * full if isinstance(mlp.floor, float) else mlp.floor
    return min(full, -int(-(asked - EXACT) // mlp.multiple_of) * mlp.multiple_of)


def _round_alone(wanted: float, full: int, mlp: Mlp) -> int:
    """Round the width asked for one layer; raises InputError where that is less than the floor."""
    width, least = round_down(wanted, full, mlp.multiple_of), floor_width(mlp, full)
    if width < least:
        raise InputError(
            f"student.mlp.keep: {int(wanted + EXACT)} of {full} neurons rounds down to {width} with multiple_of "
            f"{mlp.multiple_of}, below the floor of {least}; keep more, or lower floor or multiple_of"
        )
    return width


def _spend_budget(wanted: list[float], floors: list[int], full: list[int], multiple: int, budget: int) -> list[int]:
    """Spread a budget of neurons: from the floors up, each next multiple goes to the layer furthest below its wish."""
    widths, left = list(floors), budget - sum(floors)
    if left < 0:
        raise InputError(
            f"student.mlp.keep: {budget} neurons over {len(full)} layers are fewer than the {sum(floors)} that each "
            f"layer's floor (at least one multiple_of) comes to; keep more, or lower floor or multiple_of"
        )
    queue = [(width - wish, index) for index, (width, wish) in enumerate(zip(widths, wanted, strict=True))]
    heapq.heapify(queue)
    while queue:
        _, index = heapq.heappop(queue)
        step = min(multiple, full[index] - widths[index])
        if 0 < step <= left:
            widths[index] += step
            left -= step
            heapq.heappush(queue, (widths[index] - wanted[index], index))
    return widths

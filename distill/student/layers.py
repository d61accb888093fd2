"""Policies that choose the kept layers: one function each, `(layers, keep, statistics, **own) -> ascending indices`.

`layers` is the teacher's number of layers, `keep` how many the student has. A policy with the parameter `protected`
honours `student.layers.protect_first` and `protect_last`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch

from distill.errors import InputError
from distill.models.family import check_kept, layers_of, protected_layers
from distill.models.layout import StackName
from distill.recipe.schema import Layers
from distill.registry import bind, find
from distill.student.calibration.statistics import Statistics, require

READS = {"loss_drop": "losses_without", "greedy_loss": "removals"}
"""Policy -> the statistics that it reads and that not every calibration collects."""


def policy_of(spec: Layers) -> str:
    """Name of the policy that decides; `explicit` where the recipe lists the layers."""
    return spec.choose if isinstance(spec.keep, int) else "explicit"


def choose_layers(model: Any, side: StackName, spec: Layers | None, calibration: Statistics | None) -> list[int]:
    """Choose the kept layers of one stack, ascending; all of them when nothing is asked.

    Raises:
        InputError: The policy cannot choose, chooses something else, or a kept layer depends on a dropped one.
    """
    if spec is None:
        return list(range(len(layers_of(model, side))))
    chosen = spec.keep
    if isinstance(chosen, int):
        chosen = _apply_policy(model, side, spec, chosen, calibration and calibration.of(side))
    check_kept(model, side, chosen)
    return chosen


def _apply_policy(model: Any, side: StackName, spec: Layers, keep: int, statistics: Statistics | None) -> list[int]:
    key, depth = "student.layers" if side == "main" else "student.encoder_layers", len(layers_of(model, side))
    policy = bind(find(LAYER_POLICIES, spec.choose, "layer policy"), spec.params, f"{key}.params")
    if "protected" in inspect.signature(policy).parameters:
        policy = partial(policy, protected=protected_layers(model, side, spec))
    elif spec.protect_first or spec.protect_last:
        raise InputError(
            f"{key}: protect_first and protect_last have no effect on the policy {spec.choose}; remove them"
        )
    chosen: list[int] = policy(depth, keep, statistics)
    if not isinstance(chosen, list) or len(chosen) != keep or sorted({*chosen} & {*range(depth)}) != chosen:
        message = f"{key}.choose: {spec.choose} returned {chosen}, not {keep} ascending layers of {depth} in a list"
        raise InputError(message)
    return chosen


def even(layers: int, keep: int, _statistics: Statistics | None) -> list[int]:
    """Evenly spaced with the first and the last layer kept, truncated as in distil-whisper (12 -> 6: 0,2,4,6,8,11)."""
    if keep == 1:
        return [layers - 1]
    chosen = [int(i * (layers - 1) / (keep - 1)) for i in range(keep)]
    return [*chosen[:-1], layers - 1]


def even_rounded(layers: int, keep: int, _statistics: Statistics | None) -> list[int]:
    """Evenly spaced with the first and the last layer kept, rounded as in DistilBERT (12 -> 6: 0,2,4,7,9,11)."""
    if keep == 1:
        return [0]
    return [(2 * i * (layers - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep)]


def every(layers: int, keep: int, _statistics: Statistics | None) -> list[int]:
    """The last layer of each of `keep` equal groups (6 -> 3: 1,3,5), the "skip" rule of Sun et al. 2019, PKD."""
    stride = layers // keep
    return list(range(stride - 1, layers, stride))


def first(_layers: int, keep: int, _statistics: Statistics | None) -> list[int]:
    """The first `keep` layers."""
    return list(range(keep))


def last(layers: int, keep: int, _statistics: Statistics | None) -> list[int]:
    """The last `keep` layers."""
    return list(range(layers - keep, layers))


def random(
    layers: int,
    keep: int,
    _statistics: Statistics | None,
    *,
    protected: Collection[int] = frozenset(),
    seed: int = 0,
) -> list[int]:
    """A random choice: the control for every other policy."""
    order = torch.randperm(layers, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(sorted(order, key=lambda layer: layer not in protected)[:keep])


def block_influence(
    layers: int, keep: int, statistics: Statistics | None, *, protected: Collection[int] = frozenset()
) -> list[int]:
    """The `keep` layers with the highest Block Influence, 1 - mean cos(input, output) (Men et al. 2024, ShortGPT).

    Ties keep the lower index.
    """
    return _highest(require(statistics, "block_influence").block_influence().tolist()[:layers], keep, protected)


def angular(
    layers: int, keep: int, statistics: Statistics | None, *, protected: Collection[int] = frozenset()
) -> list[int]:
    """Drop the block of layers l to l + n - 1 with the smallest angular distance d(h_l, h_{l+n}).

    Source: Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887); the states
    are raw layer outputs at the last real token, also that of the last layer.

    Raises:
        InputError: Every block holds a protected layer.
    """
    distances, gap = require(statistics, "angular").angular_distance(), layers - keep
    starts = [start for start in range(keep + 1) if not any(start <= layer < start + gap for layer in protected)]
    if not starts:
        raise InputError(f"student.layers.choose: no {gap} layers in a row are free of protected ones")
    best = min(starts, key=lambda start: float(distances[start, start + gap]))
    return [layer for layer in range(layers) if not best <= layer < best + gap]


def loss_drop(
    layers: int, keep: int, statistics: Statistics | None, *, protected: Collection[int] = frozenset()
) -> list[int]:
    """Drop the layers whose removal, each alone, raises the labels' loss least (Kim et al. 2024, Shortened LLaMA)."""
    return _highest(require(statistics, "loss_drop").loss_without().tolist()[:layers], keep, protected)


def greedy_loss(
    layers: int, keep: int, statistics: Statistics | None, *, protected: Collection[int] = frozenset()
) -> list[int]:
    """Drop layers one by one, each time the one that raises the loss least, recomputed (Song et al. 2024, SLEB).

    Raises:
        InputError: The calibration removed fewer layers, or protected ones: it was made for another request.
    """
    gone = require(statistics, "greedy_loss").removals[: layers - keep]
    if len(gone) < layers - keep or set(gone) & set(protected):
        raise InputError("student.layers.choose: the calibration's removals are for another request; calibrate again")
    return [layer for layer in range(layers) if layer not in gone]


def _highest(values: Sequence[float], keep: int, protected: Collection[int]) -> list[int]:
    """The protected layers and those with the highest values, `keep` in all; ties keep the lower index."""
    order = sorted(range(len(values)), key=lambda layer: (layer not in protected, -values[layer], layer))
    return sorted(order[:keep])


LAYER_POLICIES: dict[str, Callable[..., list[int]]] = {
    "even": even,
    "even_rounded": even_rounded,
    "every": every,
    "first": first,
    "last": last,
    "random": random,
    "block_influence": block_influence,
    "angular": angular,
    "loss_drop": loss_drop,
    "greedy_loss": greedy_loss,
}

"""Which layers to keep: one function per policy, `(layers, keep, statistics, **own) -> ascending indices`.

`layers` is the teacher's number of layers, `keep` how many the student has. A policy that reads no statistics works
without calibration.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from distill.errors import InputError
from distill.student.calibrate import Statistics


def even(layers: int, keep: int, _statistics: Statistics | None) -> list[int]:
    """Evenly spaced with the first and the last layer kept, truncated as in distil-whisper (12 -> 6: 0,2,4,6,8,11)."""
    if keep == 1:
        return [layers - 1]
    chosen = [int(i * (layers - 1) / (keep - 1)) for i in range(keep)]
    return [*chosen[:-1], layers - 1]


def every(layers: int, keep: int, _statistics: Statistics | None) -> list[int]:
    """The last layer of each of `keep` equal groups (6 -> 3: 1,3,5), the "skip" rule of Sun et al. 2019, PKD.

    Raises:
        InputError: `keep` does not divide the number of layers.
    """
    if layers % keep:
        raise InputError(f"student.layers.choose: `every` needs keep to divide {layers} layers; {keep} does not")
    stride = layers // keep
    return list(range(stride - 1, layers, stride))


def first(_layers: int, keep: int, _statistics: Statistics | None) -> list[int]:
    """The first `keep` layers."""
    return list(range(keep))


def last(layers: int, keep: int, _statistics: Statistics | None) -> list[int]:
    """The last `keep` layers."""
    return list(range(layers - keep, layers))


def random(layers: int, keep: int, _statistics: Statistics | None, *, seed: int = 0) -> list[int]:
    """A random choice: the control for every other policy."""
    order = torch.randperm(layers, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:keep].tolist())


def block_influence(layers: int, keep: int, statistics: Statistics | None) -> list[int]:
    """The `keep` layers with the highest Block Influence, 1 - mean cos(input, output) (Men et al. 2024, ShortGPT).

    Ties keep the lower index.
    """
    if statistics is None:
        raise InputError("student.layers.choose: `block_influence` needs calibration data")
    influence = statistics.block_influence()
    order = sorted(range(layers), key=lambda index: (-float(influence[index]), index))
    return sorted(order[:keep])


CHOICES: dict[str, Callable[..., list[int]]] = {
    "even": even,
    "every": every,
    "first": first,
    "last": last,
    "random": random,
    "block_influence": block_influence,
}

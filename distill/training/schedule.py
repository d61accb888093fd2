"""Learning-rate schedules as pure functions of the step, so that a resumed run needs the step and nothing else.

The rate is written onto the optimizer's groups: a scheduler prepared by Accelerate would advance once per process.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine(progress: float, _decay: float) -> float:
    """Half a cosine from 1 to 0 (Loshchilov & Hutter 2017, SGDR, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float, _decay: float) -> float:
    """A straight line from 1 to 0."""
    return 1 - progress


def constant(_progress: float, _decay: float) -> float:
    """Always 1."""
    return 1.0


def wsd(progress: float, decay: float) -> float:
    """1, then a straight line to 0 over the last share `decay` (Hu et al. 2024, arXiv 2404.06395)."""
    return min(1.0, (1 - progress) / decay) if decay > 0 else 1.0


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "wsd": wsd,
}
"""`(progress, decay) -> factor`: the share of the steps after warmup that are done, and the share that goes down."""


def in_steps(length: float, steps: int) -> int:
    """A length below 1 is a share of `steps`, otherwise a number of steps."""
    return min(steps, round(length * steps) if length < 1 else round(length))


def lr_factor(step: int, steps: int, warmup: float, schedule: str, decay: float = 0.0) -> float:
    """Factor on the peak learning rate for optimizer step `step` (0 is the first of `steps`).

    Rises linearly to 1 over the warmup; its first value is above 0, so no step is wasted.
    """
    rising = in_steps(warmup, steps)
    if step < rising:
        return (step + 1) / rising
    left = max(1, steps - rising)
    return SCHEDULES[schedule]((step - rising) / left, min(1.0, in_steps(decay, steps) / left))

"""Learning-rate schedules as pure functions of the step, so that a resumed run needs the step and nothing else.

The rate is written onto the optimizer's groups: a scheduler prepared by Accelerate would advance once per process.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0 (Loshchilov & Hutter 2017, SGDR, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """A straight line from 1 to 0."""
    return 1 - progress


def constant(_progress: float) -> float:
    """Always 1."""
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": cosine, "linear": linear, "constant": constant}


def warmup_steps(warmup: float, steps: int) -> int:
    """`warmup` below 1 is a share of `steps`, otherwise a number of steps."""
    return min(steps, round(warmup * steps) if warmup < 1 else round(warmup))


def lr_factor(step: int, steps: int, warmup: float, schedule: str) -> float:
    """Factor on the peak learning rate for optimizer step `step` (0 is the first of `steps`).

    Rises linearly to 1 over the warmup; its first value is above 0, so no step is wasted.
    """
    rising = warmup_steps(warmup, steps)
    if step < rising:
        return (step + 1) / rising
    return SCHEDULES[schedule]((step - rising) / max(1, steps - rising))

"""The precision in which the output head takes its operands: its price near the teacher, and the choice by that.

The gradient of a divergence is a difference of two sets of probabilities. The closer they are, the more of it is the
rounding of the operands: its relative error grows as 1 / sqrt(KL), whatever the divergence.
`scripts/benchmarks/head_precision.py` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from distill.models.head import HeadPrecision

ERROR_AT_ONE: dict[HeadPrecision, float] = {"bf16": 4e-3, "tf32": 5e-4}
"""Relative error of the gradient times sqrt(KL), measured; fp32 has none that counts."""
LIMIT = 0.02
"""Error that is accepted."""

KL_NEAR: dict[str, Callable[[float, Mapping[str, Any]], float]] = {
    "forward_kl": lambda value, _: value,
    "reverse_kl": lambda value, _: value,
    "symmetric_kl": lambda value, _: value,
    "adaptive_kl": lambda value, _: value,
    "jsd": lambda value, params: value / _at_least(params.get("beta", 0.5) * (1 - params.get("beta", 0.5))),
    "skew_forward_kl": lambda value, params: value / _at_least((1 - params.get("alpha", 0.1)) ** 2),
    "skew_reverse_kl": lambda value, params: value / _at_least((1 - params.get("alpha", 0.1)) ** 2),
    "tail_aware_kl": lambda value, params: value / max(1.0, params.get("beta", 2.0)),
    "total_variation": lambda *_: 0.0,
    "logit_mse": lambda value, _: value / 2,
}
"""Divergence -> KL near the teacher from its value. All are of second order in the difference of the distributions,
with the second derivative of their generator at 1 as factor, for which the tail-aware one has 1 in the head and beta in
the tail. The gradient of the total variation jumps where the probabilities cross: there any rounding counts, at any
distance."""


def _at_least(factor: float) -> float:
    return factor if factor > 1e-3 else 1.0  # the limits of a mixture are plain divergences


def estimate_kl(name: str, value: float, params: Mapping[str, Any]) -> float | None:
    """Estimate the KL in nats at temperature 1 from a divergence; None where nothing is known about it.

    Args:
        name: A name of `LOGITS`, or another one.
        value: Its mean, times temperature², which makes it nearly independent of the temperature.
        params: Its parameters.
    """
    return KL_NEAR[name](value, params) if name in KL_NEAR else None


def choose_precision(kl: float | None) -> HeadPrecision:
    """Choose the fastest precision whose error is within `LIMIT` at this KL; `tf32` where the KL is not known."""
    if kl is None or math.isnan(kl):
        return "tf32"
    fits = [name for name, error in ERROR_AT_ONE.items() if error <= LIMIT * math.sqrt(max(kl, 0.0))]
    return fits[0] if fits else "fp32"

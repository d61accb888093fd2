"""Optimizers and learning-rate schedules by name.

A schedule is a pure function of the step, so that a resumed run needs the step and nothing else. The rate is written
onto the optimizer's groups: a scheduler prepared by Accelerate would advance once per rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from distill.errors import InputError
from distill.recipe.schema import Optimization
from distill.registry import bind, find

Groups = list[dict[str, Any]]


def adamw(
    groups: Groups, *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101)."""
    # The fused kernel is about 9 times faster than the default on a CPU, and the fastest one on a GPU.
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": adamw}
"""`(groups, *, lr, ...) -> optimizer`; `betas` are given to `adamw` alone."""


def find_optimizer(spec: Optimization) -> Callable[..., torch.optim.Optimizer]:
    """Find the recipe's optimizer and fill in its own parameters. Raises InputError when there is none like that."""
    function = find(OPTIMIZERS, spec.optimizer, "optimizer")
    return bind(function, spec.optimizer_params, "optimizer_params")


def make_optimizer(model: nn.Module, spec: Optimization) -> torch.optim.Optimizer:
    """Make the recipe's optimizer over the trainable parameters; vectors (biases, norms) are not decayed.

    Raises:
        InputError: The user's function does not return an optimizer.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    own = {"betas": spec.betas} if spec.optimizer == "adamw" else {}
    optimizer = find_optimizer(spec)([group for group in groups if group["params"]], lr=spec.lr, **own)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"optimizer: {spec.optimizer} must return a torch.optim.Optimizer, got {type(optimizer)}")
    return optimizer


def half_cosine(progress: float, _decay: float) -> float:
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
    "cosine": half_cosine,
    "linear": linear,
    "constant": constant,
    "wsd": wsd,
}
"""`(progress, decay) -> factor`: the share of the steps after warmup that are done, and the share that goes down."""


def in_steps(length: float, steps: int) -> int:
    """Convert a length to steps: below 1 it is a share of `steps`, otherwise a number of steps."""
    return min(steps, round(length * steps) if length < 1 else round(length))


def lr_factor(step: int, steps: int, warmup: float, schedule: str, decay: float = 0.0) -> float:
    """Compute the factor on the peak learning rate for optimizer step `step` (0 is the first of `steps`).

    Rises linearly to 1 over the warmup; its first value is above 0, so no step is wasted.
    """
    rising = in_steps(warmup, steps)
    if step < rising:
        return (step + 1) / rising
    left = max(1, steps - rising)
    return SCHEDULES[schedule]((step - rising) / left, min(1.0, in_steps(decay, steps) / left))

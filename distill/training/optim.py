"""Optimizers and learning-rate schedules by name.

A schedule is a pure function of the step, so that a resumed run needs the step and nothing else. The rate is written
onto the optimizer's groups: a scheduler prepared by Accelerate would advance once per rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import InputError
from distill.models.quantised import import_bitsandbytes
from distill.recipe.schema import Optimization
from distill.registry import bind, find
from distill.training.masters import MasterAdamW

Groups = list[dict[str, Any]]


def adamw(
    groups: Groups, *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101)."""
    # The fused kernel is about 9 times faster than the default on a CPU, and the fastest one on a GPU.
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def adamw_8bit(
    groups: Groups, *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.Optimizer:
    """AdamW with moments of 8 bits, from bitsandbytes. Raises InputError where that is not installed."""
    return _eight_bits()(groups, {}, lr=lr, betas=betas, eps=eps)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": adamw, "adamw_8bit": adamw_8bit}
"""`(groups, *, lr, ...) -> optimizer`; `betas` are given to these alone, and not to a function of the user's own."""


def _eight_bits() -> Callable[..., torch.optim.Optimizer]:
    if not import_bitsandbytes():
        raise InputError("optimizer: adamw_8bit needs bitsandbytes: pip install 'distill[int8]'")
    from distill.training.adamw8 import MasterAdamW8bit

    return MasterAdamW8bit


def make_optimizer(
    model: nn.Module, spec: Optimization, rests: dict[Tensor, Tensor] | None = None
) -> torch.optim.Optimizer:
    """Make the recipe's optimizer over the trainable parameters; vectors (biases, norms) are not decayed.

    Args:
        model: Its parameters are frozen where they do not learn.
        spec: The recipe's section.
        rests: Of each bf16 parameter, what its rounding left (`Masters.rests`): its fp32 master is what is stepped.

    Raises:
        InputError: The user's function fails, does not return an optimizer, or leaves out some of the parameters.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if rests is not None:
        kind = MasterAdamW if spec.optimizer == "adamw" else _eight_bits()
        return kind(groups, rests, lr=spec.lr, betas=spec.betas, **spec.optimizer_params)
    own = {"betas": spec.betas} if spec.optimizer in OPTIMIZERS else {}
    function = bind(find(OPTIMIZERS, spec.optimizer, "optimizer"), spec.optimizer_params, "optimizer_params")
    with _refused(spec.optimizer, "called with parameter groups and lr"):
        optimizer = function(groups, lr=spec.lr, **own)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"optimizer: {spec.optimizer} must return a torch.optim.Optimizer, got {type(optimizer)}")
    taken = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if left := sum(id(parameter) not in taken for parameter in trained):
        raise InputError(
            f"optimizer: {spec.optimizer} takes {len(trained) - left} of the {len(trained)} parameters that it is "
            f"given, and the others would never learn; it must take all: what shall not learn is named by freeze"
        )
    return optimizer


def try_optimizer(spec: Optimization, device: torch.device) -> None:
    """Make the recipe's optimizer for a matrix and a vector, and take a step where it is the user's own.

    Raises:
        InputError: It cannot be made or cannot step, or parameters are left out.
    """
    with torch.random.fork_rng(devices=[]):
        model = nn.Linear(2, 2, device=device)
    optimizer = make_optimizer(model, spec)
    if spec.optimizer not in OPTIMIZERS:
        model(torch.ones(1, 2, device=device)).sum().backward()
        with _refused(spec.optimizer, "step(None) after a backward pass of a linear map"):
            optimizer.step(None)  # as Accelerate does


@contextmanager
def _refused(name: str, how: str) -> Iterator[None]:
    """Refuse an optimizer that fails, whatever it fails with."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        fix = "change its parameters" if name in OPTIMIZERS else "change it or its parameters"
        raise InputError(f"optimizer: {name} cannot be used: {problem} ({how}); {fix}") from error


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    # Loshchilov & Hutter 2017 (SGDR), without restarts.
    "cosine": lambda progress, _decay: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress, _decay: 1 - progress,
    "constant": lambda _progress, _decay: 1.0,
    # Hu et al. 2024, arXiv 2404.06395: constant, then linear.
    "wsd": lambda progress, decay: min(1.0, (1 - progress) / decay) if decay > 0 else 1.0,
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

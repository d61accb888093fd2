"""Every loss is called on two positions before anything is trained, so that one that cannot teach is found then.

N positions, D columns, H attention heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from distill.errors import InputError

POSITIONS = 2
COLUMNS = 64
"""At least; widths, classes and vocabularies of real models are others, and a loss has to work with any."""
CLASSES = {"regression": 1, "multi_label": 2}
"""Kind of head -> columns of its predictions, where they are always as many."""


def try_out(loss: Callable[..., Any], match: str, head: str, params: Mapping[str, Any], where: str, name: str) -> None:
    """Call a loss with made-up numbers and see whether a student can learn from what it returns.

    Args:
        loss: With its parameters filled in.
        match: What the term compares; it decides what the loss is given.
        head: The kind of head.
        params: The parameters, of which whole numbers may have to divide the columns.
        where: Key of the term, for messages.
        name: Name of the loss, for messages.

    Raises:
        InputError: it fails, does not return one value per position, or has no gradient for the student.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        device = torch.accelerator.current_accelerator() or torch.device("cpu")  # where kernels of one's own run
        classes = CLASSES.get(head) if match == "logits" else None
        student, given, shape = _arguments(match, classes, params.values(), device)
        try:
            values = loss(student if match == "relations" else student[0], *given)
        except Exception as error:
            problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise InputError(f"{where}.params: {problem} (from {name}, tried on {POSITIONS} positions)") from error
        check_values(values, shape, f"{where}: {name}")
        try:
            slopes = torch.autograd.grad(values.sum(), student, allow_unused=True) if values.requires_grad else [None]
        except RuntimeError as error:
            raise InputError(f"{where}: {name} has no gradient: {error}") from error
    if all(slope is None for slope in slopes):
        raise InputError(
            f"{where}: {name} has no gradient for the student, which would learn nothing from it; compute it from the "
            "student's tensor, without detach(), item(), numpy() or argmax()"
        )


def check_values(values: Any, shape: tuple[int, ...], name: str) -> None:
    """Refuse what is not one number per position: a loss with its own mean would weigh every micro-batch the same.

    Raises:
        InputError: it is something else.
    """
    if isinstance(values, Tensor) and values.shape == shape and values.is_floating_point():
        return
    found = f"{tuple(values.shape)} {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
    raise InputError(f"{name} must return one value per position, {tuple(shape)}, got {found}")


def _arguments(
    match: str, classes: int | None, params: Iterable[Any], device: torch.device
) -> tuple[list[Tensor], list[Any], tuple[int, ...]]:
    """The student's tensors, all further arguments, and the shape that the values must have."""
    draw = torch.Generator().manual_seed(0)
    whole = [number for number in params if type(number) is int and 0 < number <= 4096]
    columns = classes or math.lcm(COLUMNS, *whole[:2])
    if match == "attention":
        shape: tuple[int, ...] = (1, 2, POSITIONS, POSITIONS)
    else:
        shape = (1, POSITIONS, columns) if match == "relations" else (POSITIONS, columns)
    count = 3 if match == "relations" else 1
    own, target = ([torch.randn(shape, generator=draw).to(device) for _ in range(count)] for _ in range(2))
    if match == "attention":
        own, target = ([tensor.softmax(-1) for tensor in side] for side in (own, target))
    own = [tensor.requires_grad_() for tensor in own]
    if match not in ("attention", "relations"):
        return own, target, shape[:-1]
    seen = torch.ones(1, POSITIONS, POSITIONS, dtype=torch.bool, device=device)
    return own, [target if match == "relations" else target[0], seen], (1, POSITIONS)

"""Losses on logits without the logits: a few positions at a time through the output heads, gradient included.

The gradient of a chunk is formed while its logits are there, in the forward pass, and backward only hands it out. So
`[N, V]` never exists, nothing is computed twice, and the large buffers are allocated once: a fresh large tensor costs
more page faults than its arithmetic. Any loss will do: a chunk's logits are cut into blocks that fit the processor's
cache, and autograd differentiates the loss on each. `OutputHead.__call__` and the loss on all logits at once are the
plain form of the same, which the tests compare.

N positions, V vocabulary, D what the head reads, K terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.models.head import OutputHead

SumTerms = Callable[[Tensor, Any, Tensor], Tensor]
"""(student's logits [n, V], teacher's [n, V'] or None, labels [n]) -> sum of each term over these positions, [K]."""

CHUNK = {"cpu": (5 * 10**6, 128, 512), "cuda": (2**28, 512, 4096)}
"""Device -> logits per chunk, and the fewest and most positions in it. With few positions the gradient of the weight is
slow, as it is read and written once per chunk; with many the buffers are large."""
BLOCK = {"cpu": 2**18, "cuda": 2**28}
"""Logits that the loss is computed on at once: on a CPU, what stays in its cache."""


def chunk_size(vocabulary: int, device: torch.device) -> int:
    """Choose the positions per chunk."""
    logits, fewest, most = CHUNK.get(device.type, CHUNK["cuda"])
    return min(most, max(fewest, logits // vocabulary))


@dataclass(frozen=True)
class HeadInput:
    """One model's logits at N positions, not yet computed."""

    rows: Tensor
    """[N, D] what the head reads."""
    head: OutputHead


def chunks(sides: Sequence[Any], size: int | None = None) -> Iterator[tuple[slice, list[Any]]]:
    """Compute the logits of every side, chunk by chunk, without gradient.

    Args:
        sides: a `HeadInput`, whose logits are computed, or something that has one entry for each of the N positions.
        size: Positions per chunk; None: `chunk_size`.

    Yields:
        Which positions, and per side its logits [n, V], in a buffer that the next chunk overwrites, or its slice.
    """
    work = [side.head.operands(side.rows) if isinstance(side, HeadInput) else (None, side) for side in sides]
    positions, device = len(work[0][1]), work[0][1].device
    vocabulary = max(len(head.weight) if head else 1 for head, _ in work)
    size = size or chunk_size(vocabulary, device)
    lengths = [min(size, positions) * len(head.weight) if head else 0 for head, _ in work]
    kind = torch.promote_types(work[0][1].dtype, torch.float32)
    # One allocation for all: large enough that the system takes it back at the end, instead of the heap growing by it.
    buffers = torch.split(torch.empty(sum(lengths), dtype=kind, device=device), lengths)
    for start in range(0, positions, size):
        part = slice(start, min(start + size, positions))
        logits = []
        for (head, data), buffer in zip(work, buffers, strict=True):
            own = data[part]
            if head is not None:
                shape = len(own), len(head.weight)
                own = head.logits(own, out=buffer[: shape[0] * shape[1]].view(shape))
            logits.append(own)
        yield part, logits


def through_heads(
    student: HeadInput, teacher: Any, labels: Tensor, sum_terms: SumTerms, factors: Tensor, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the loss, with the gradient of the student's rows and head.

    Args:
        student: Its rows and head, part of the graph.
        teacher: Its rows and head, its logits [N, V'], or anything else that slices like them and that the terms
            understand; None where no term reads it.
        labels: [N].
        sum_terms: The terms; differentiated by autograd, so it must not change its arguments in place.
        factors: [K] factor of each sum in the loss.
        size: Positions per chunk; None: `chunk_size`.

    Returns:
        The loss, and the sum of each term [K] without gradient. Without positions both are 0 and so are the gradients.
    """
    work = _Work(student.head, teacher, labels, sum_terms, factors, size)
    loss, sums = _ThroughHeads.apply(student.rows, student.head.weight, student.head.bias, work)  # type: ignore[no-untyped-call]
    return loss, sums


@dataclass(frozen=True)
class _Work:
    head: OutputHead
    teacher: Any
    labels: Tensor
    sum_terms: SumTerms
    factors: Tensor
    size: int | None


class _Gradients:
    """The gradients of rows, weight and bias, added up chunk by chunk; None where nobody asks."""

    def __init__(self, rows: Tensor, head: OutputHead, needed: tuple[bool, ...]):
        def zeros(like: Tensor) -> Tensor:
            return torch.zeros(like.shape, dtype=head.wide, device=like.device)

        self.head, self.data = head.operands(rows)
        self.rows = zeros(rows) if needed[0] else None
        self.weight = zeros(head.weight) if needed[1] else None
        self.bias = zeros(head.bias) if needed[2] and head.bias is not None else None

    def add(self, part: slice, slope: Tensor) -> None:
        """`slope` [n, V]: the derivative of the loss by the z of these positions."""
        scale, rows = self.head.scale, self.data[part]
        low = slope.to(rows.dtype)
        if self.bias is not None:
            self.bias += slope.sum(0)
        if self.rows is not None:
            _add_product(self.rows[part], low, self.head.weight, scale)
        if self.weight is not None:
            _add_product(self.weight, low.T, rows, scale)


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, alpha=scale, out=total)
    else:
        total.add_(torch.mm(left, right, out_dtype=total.dtype), alpha=scale)


class _ThroughHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> tuple[Tensor, Tensor]:
        head, factors = work.head, work.factors
        needed = ctx.needs_input_grad[:3]
        gradients = _Gradients(rows, head, needed)
        total = torch.zeros(len(factors), dtype=torch.float64, device=rows.device)
        step = max(1, BLOCK.get(rows.device.type, BLOCK["cuda"]) // len(weight))
        # The cap is left to the blocks, where autograd sees it.
        sides = [HeadInput(rows, replace(head, cap=None)), *([] if work.teacher is None else [work.teacher])]
        for part, (linear, *target) in chunks(sides, work.size):
            for start in range(0, len(linear), step):
                block = slice(start, start + step)
                with torch.set_grad_enabled(any(needed)), torch.autocast(linear.device.type, enabled=False):
                    leaf = linear[block].detach().requires_grad_(any(needed))
                    teacher = target[0][block] if target else None
                    sums = work.sum_terms(head.capped(leaf), teacher, work.labels[part][block])
                    if any(needed):  # the derivative of the loss by these logits takes their place
                        (slope,) = torch.autograd.grad((factors * sums).sum(), leaf)
                        linear[block] = slope
                total += sums.detach()
            if any(needed):
                gradients.add(part, linear)
        ctx.gradients = [gradients.rows, gradients.weight, gradients.bias]
        ctx.kinds = [rows.dtype, weight.dtype, None if bias is None else bias.dtype]
        total = total.to(head.wide)
        ctx.mark_non_differentiable(total)
        return (factors * total).sum(), total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, _sums: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        if torch._C._autograd._get_current_graph_task_keep_graph():
            gradients = [None if own is None else own.clone() for own in gradients]
        else:  # the last time: scaled in place, and let go, so that the weight's gradient is never there twice
            ctx.gradients = None
        pairs = zip(gradients, ctx.kinds, strict=True)
        return (*(None if own is None else own.mul_(slope).to(kind) for own, kind in pairs), None)

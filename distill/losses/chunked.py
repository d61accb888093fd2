"""Losses on logits without the logits: a few positions at a time through the output heads, gradient included.

The gradient of a chunk is formed while its logits are there, in the forward pass, and backward only hands it out. So
`[N, V]` never exists, nothing is computed twice, and the large buffers are allocated once: a fresh large tensor costs
more page faults than its arithmetic. Any loss will do; `slopes` says by which method it is differentiated.
`OutputHead.__call__` and the loss on all logits at once are the plain form of the same, which the tests compare.

N positions, V vocabulary, D what the head reads, K terms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.losses.slopes import Chunk, Fastest, SlopeMethod, SumTerms, Terms, blocks
from distill.models.head import OutputHead, products, soft_cap
from distill.models.memory import free_bytes
from distill.models.mixture import MixtureHead

CHUNK = {"cpu": (5 * 10**6, 128, 512), "cuda": (2**28, 512, 4096)}
"""Device -> logits per chunk, and the fewest and most positions in it. With few positions the gradient of the weight is
slow, as it is read and written once per chunk; with many the buffers are large."""
SHARE_OF_FREE = 8
"""On a GPU the two buffers of logits take at most one part in so many of the memory that is free."""
ROW_MULTIPLE = {"cuda": 64}
"""Device -> rows of logits start at multiples of so many numbers, as matrix products on odd addresses are slow."""


def chunk_size(vocabulary: int, device: torch.device) -> int:
    """Choose the positions per chunk: as many as suit the device, and fewer where its memory is nearly full."""
    logits, fewest, most = CHUNK.get(device.type, CHUNK["cuda"])
    if device.type == "cuda" and torch.cuda.is_available():  # a plan may be for a card that is not there
        logits = min(logits, free_bytes(device) // (2 * 4 * SHARE_OF_FREE))
        fewest = min(fewest, max(64, logits // vocabulary))
    size = min(most, max(fewest, logits // vocabulary))
    return max(64, size // 64 * 64) if device.type == "cuda" else size


@dataclass(frozen=True)
class HeadInput:
    """One model's logits at N positions, not yet computed."""

    rows: Tensor
    """[N, D] what the head reads."""
    head: OutputHead | MixtureHead


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
    size = min(size or chunk_size(vocabulary, device), max(1, positions))
    multiple = ROW_MULTIPLE.get(device.type, 1)
    pitches = [-(-len(head.weight) // multiple) * multiple if head else 0 for head, _ in work]
    kind = torch.promote_types(work[0][1].dtype, torch.float32)
    # One allocation for all: large enough that the system takes it back at the end, instead of the heap growing by it.
    room = torch.empty(size * sum(pitches), dtype=kind, device=device)
    buffers = torch.split(room, [size * pitch for pitch in pitches])
    for start in range(0, positions, size):
        part = slice(start, min(start + size, positions))
        logits = []
        for (head, data), buffer, pitch in zip(work, buffers, pitches, strict=True):
            own = data[part]
            if head is not None:
                own = head.logits(own, out=buffer.view(size, pitch)[: len(own), : len(head.weight)])
            logits.append(own)
        yield part, logits


def through_heads(
    student: HeadInput,
    teacher: Any,
    labels: Tensor,
    terms: Terms | SumTerms,
    factors: Tensor,
    size: int | None = None,
    method: SlopeMethod | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the loss, with the gradient of the student's rows and head.

    Args:
        student: Its rows and head, part of the graph.
        teacher: Its rows and head, its logits [N, V'], or anything else that slices like them and that the terms
            understand; None where no term reads it.
        labels: [N].
        terms: The terms, or only their sums.
        factors: [K] factor of each sum in the loss.
        size: Positions per chunk; None: `chunk_size`.
        method: Computes the slope of a chunk; None: whatever is fastest here.

    Returns:
        The loss, and the sum of each term [K] without gradient. Without positions both are 0 and so are the gradients.
    """
    terms = terms if isinstance(terms, Terms) else Terms(terms)
    assert isinstance(student.head, OutputHead), "a student has one head"
    work = _Work(student.head, teacher, labels, terms, factors, size, method or Fastest())
    loss, sums = _ThroughHeads.apply(student.rows, student.head.weight, student.head.bias, work)  # type: ignore[no-untyped-call]
    return loss, sums


@dataclass(frozen=True)
class _Work:
    head: OutputHead
    teacher: Any
    labels: Tensor
    terms: Terms
    factors: Tensor
    size: int | None
    method: SlopeMethod


class _Gradients:
    """The gradients of rows, weight and bias, added up chunk by chunk; None where nobody asks."""

    def __init__(self, rows: Tensor, head: OutputHead, needed: tuple[bool, ...]):
        def make(like: Tensor) -> Tensor:
            # The first chunk fills the weight's, and each chunk its own rows: nothing is cleared beforehand.
            fill = torch.empty if len(rows) else torch.zeros
            return fill(like.shape, dtype=head.wide, device=like.device)

        self.head, self.data = head.operands(rows)
        self.rows = make(rows) if needed[0] else None
        self.weight = make(head.weight) if needed[1] else None
        self.bias = make(head.bias).zero_() if needed[2] and head.bias is not None else None

    @property
    def product(self) -> torch.dtype:
        """The dtype in which the products with the slope are taken."""
        return self.data.dtype

    def add(self, part: slice, slope: Tensor) -> None:
        """`slope` [n, V]: the derivative of the loss by the z of these positions."""
        scale, rows = self.head.scale, self.data[part]
        low = slope.to(rows.dtype)
        if self.bias is not None:
            self.bias += slope.sum(0, dtype=self.bias.dtype)
        with products(self.head.precision, rows.device):
            if self.rows is not None:
                _add_product(self.rows[part], low, self.head.weight, scale, first=True)
            if self.weight is not None:
                _add_product(self.weight, low.T, rows, scale, first=part.start == 0)


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float, *, first: bool) -> None:
    """Add scale · left · right to `total`, or put it there where nothing is there yet."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, beta=0 if first else 1, alpha=scale, out=total)
    elif first and scale == 1:
        torch.mm(left, right, out_dtype=total.dtype, out=total)
    elif first:
        torch.mul(torch.mm(left, right, out_dtype=total.dtype), scale, out=total)
    elif _adds_wide_products():
        torch.addmm(total, left, right, out_dtype=total.dtype, alpha=scale, out=total)
    else:
        total.add_(torch.mm(left, right, out_dtype=total.dtype), alpha=scale)


@cache
def _adds_wide_products() -> bool:
    """Try whether this torch adds a product of half-precision operands to fp32 in place; older ones do not."""
    try:
        total = torch.ones(16, 16, device="cuda")
        left = torch.ones(16, 16, device="cuda", dtype=torch.bfloat16)
        torch.addmm(total, left, left, out_dtype=torch.float32, alpha=0.5, out=total)
        return bool((total == 9).all())
    except (RuntimeError, TypeError):
        return False


class _ThroughHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> tuple[Tensor, Tensor]:
        head, factors = work.head, work.factors
        needed = ctx.needs_input_grad[:3]
        gradients = _Gradients(rows, head, needed)
        total = torch.zeros(len(factors), dtype=torch.float64, device=rows.device)
        # The cap is left to the terms, whose slope goes through it.
        sides = [HeadInput(rows, replace(head, cap=None)), *([] if work.teacher is None else [work.teacher])]
        for part, (linear, *target) in chunks(sides, work.size):
            chunk = Chunk(linear, target[0] if target else None, work.labels[part], head.cap, gradients.product)
            with torch.autocast(linear.device.type, enabled=False):
                if any(needed):
                    sums, slope = work.method(chunk, work.terms, factors)
                    gradients.add(part, slope)
                else:
                    sums = _sum_only(chunk, work.terms)
            total += sums
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


def _sum_only(chunk: Chunk, terms: Terms) -> Tensor:
    sums = []
    for block in blocks(chunk.linear):
        teacher = None if chunk.teacher is None else chunk.teacher[block]
        sums.append(terms.sums(soft_cap(chunk.linear[block], chunk.cap), teacher, chunk.labels[block]).double())
    return torch.stack(sums).sum(0)

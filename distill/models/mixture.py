"""Predictions of several models, mixed in probability space: the log of the weighted sum of their distributions.

Of heads over a vocabulary a few positions at a time, like all logits; of heads of classes at once. N positions, T
models, D_t what the head of each reads, B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from distill.models.head import HeadPrecision, OutputHead

Mix = Callable[[Sequence[Tensor], Tensor], Tensor]
"""(outputs of each model [B, ...], log of their weights [B, T]) -> the mixture's output."""


@dataclass(frozen=True)
class MixtureHead:
    """The output heads of several models, as one: it reads [N, D_1 + … + D_T + T], and the last are log weights."""

    parts: tuple[OutputHead, ...]
    """Of as many rows each."""
    precision: HeadPrecision | None = None
    """Of the operands of all products; None: of each head its own."""

    @property
    def weight(self) -> Tensor:
        """A matrix with a row for each logit."""
        return self.parts[0].weight

    def operands(self, rows: Tensor) -> tuple[MixtureHead, Tensor]:
        """Prepare the products, as `OutputHead.operands` does."""
        parts = [replace(part, precision=self.precision or part.precision) for part in self.parts]
        prepared = tuple(part.operands(rows[:0, : part.weight.shape[1]])[0] for part in parts)
        return replace(self, parts=prepared), rows.detach()

    def logits(self, rows: Tensor, out: Tensor) -> Tensor:
        """Write the log-probabilities of `rows` [N, D_1 + … + T] into `out` [N, V]; from `operands`, no gradient."""
        *own, weights = _columns(rows, self.parts)
        room = torch.empty_like(out)
        for number, (part, each) in enumerate(zip(self.parts, own, strict=True)):
            target = room if number else out
            part.logits(each.to(part.weight.dtype), out=target)
            target.sub_(target.logsumexp(-1, keepdim=True)).add_(weights[:, number : number + 1])
            if number:
                torch.logaddexp(out, target, out=out)
        return out

    def __call__(self, rows: Tensor) -> Tensor:
        """Compute all logits [..., V] at once: the reference of the chunked ones."""
        *own, weights = _columns(rows, self.parts)
        logits = [part(each) for part, each in zip(self.parts, own, strict=True)]
        return mix_classes([each.flatten(0, -2) for each in logits], weights.flatten(0, -2)).view(logits[0].shape)


def _columns(rows: Tensor, parts: Sequence[OutputHead]) -> tuple[Tensor, ...]:
    return torch.split(rows, [*(part.weight.shape[1] for part in parts), len(parts)], -1)


def mix_heads(
    rows: Sequence[Tensor], heads: Sequence[OutputHead], weights: Tensor, vocabulary: int | None
) -> tuple[Tensor, MixtureHead]:
    """Put what several heads read side by side, and their first `vocabulary` rows, or all that they share, into one.

    Args:
        rows: Per model [B, L, D_t].
        heads: As many.
        weights: log, [B, T].
        vocabulary: Real tokens; heads may be padded beyond.

    Returns:
        [B, L, D_1 + … + D_T + T] in fp32, and the head that reads it.
    """
    shared = min([len(head.weight) for head in heads] + ([] if vocabulary is None else [vocabulary]))
    parts = (
        replace(head, weight=head.weight[:shared], bias=None if head.bias is None else head.bias[:shared])
        for head in heads
    )
    spread = weights[:, None].expand(-1, rows[0].shape[1], -1)
    return torch.cat([*(each.float() for each in rows), spread.float()], -1), MixtureHead(tuple(parts))


def mix_classes(logits: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Mix the softmaxes over the last axis; of logits of different length over those that all have."""
    shared = min(each.shape[-1] for each in logits)
    logs = [functional.log_softmax(each[..., :shared].float(), -1) for each in logits]
    return _sum(logs, weights)


def mix_sets(logits: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Mix the probabilities of each class of a set by itself, [B, V]; the logit of the mixture."""
    yes, no = (_sum([functional.logsigmoid(sign * each.float()) for each in logits], weights) for sign in (1, -1))
    return yes - no


def mix_values(values: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Take the weighted mean of numbers, [B, 1]."""
    return (torch.stack([each.float() for each in values], -1) * weights.exp()[:, None]).sum(-1)


def _sum(logs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Add up probabilities by their logs."""
    own = weights.view(len(weights), *(1 for _ in logs[0].shape[1:]), -1)
    return torch.logsumexp(torch.stack(list(logs), -1) + own, -1)


MIXED: dict[str, Mix] = {"multi_label": mix_sets, "regression": mix_values}
"""Kind of predictions -> how outputs are mixed; other kinds are distributions over the last axis."""

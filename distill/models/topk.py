"""The most likely tokens of a distribution over the vocabulary, and one class for all others, the tail.

V: vocabulary or classes. K: tokens that are kept for each position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class TopK:
    """A teacher's most likely tokens; all others together are one more class, the tail.

    A divergence from it is that of the two distributions over these K + 1 classes, so it is zero at equality and at
    most the divergence over the whole vocabulary. To rescale the K tokens to 1 instead would teach that the tail does
    not exist.
    """

    ids: Tensor
    """int64 [..., K], each once."""
    log_probabilities: Tensor
    """[..., K + 1] of these tokens and of the tail, at temperature 1."""

    @classmethod
    def of(cls, logits: Tensor, k: int) -> TopK:
        """Keep the k most likely tokens of logits [..., V], k at most V; with k = V the tail is empty."""
        ids = logits.topk(k).indices
        return cls(ids, with_tail(logits, ids))

    def __getitem__(self, positions: Any) -> TopK:
        """Select some of the positions."""
        return TopK(self.ids[positions], self.log_probabilities[positions])

    def detach(self) -> TopK:
        """Detach from the graph."""
        return TopK(self.ids, self.log_probabilities.detach())


def with_tail(logits: Tensor, ids: Tensor) -> Tensor:
    """Compute the log-probabilities [..., K + 1] of the tokens `ids` [..., K] and of everything else, the tail.

    In fp32 (float64 stays float64). -inf where there is no probability: a forbidden token, or the tail of K = V.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cast("Tensor", _WithTail.apply(wide, ids))  # type: ignore[no-untyped-call]


class _WithTail(torch.autograd.Function):
    """Differentiate in one pass over the vocabulary, where autograd takes four.

    With g the slopes of the K + 1 values and p probabilities, the slope of a logit is g - p · sum(g) where it is kept
    and p · (g of the tail / p of the tail - sum(g)) elsewhere.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        # The tail is summed from its own terms: as 1 minus the rest it would lose its digits where it is small.
        tail = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        values = torch.cat([logits.gather(-1, ids), tail], -1)
        found = values - values.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, ids, tail, found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        logits, ids, tail, found = ctx.saved_tensors
        own = slope - found.exp() * slope.sum(-1, keepdim=True)
        shares = (logits - tail.clamp(min=torch.finfo(tail.dtype).min)).exp_()
        return shares.mul_(own[..., -1:]).scatter_(-1, ids, own[..., :-1]), None

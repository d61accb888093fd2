"""Distances between what attention does in the student and in the teacher.

Every function takes `(student, teacher, visible)` and returns one value per query position, [B, L], in fp32 (float64
stays float64). `visible` [B, L, L] is True where a query (second axis) may attend to a key (last axis); queries without
any key give 0. `ATTENTION` takes probabilities [B, H, L, L] of as many heads on both sides, `RELATION` takes queries,
keys and values, [B, L, D] each, of any widths. ValueError: the heads differ, or relation heads do not divide a width.

B examples, L positions, H attention heads, R relation heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distill.losses.align import widen, without_autocast
from distill.losses.logits import forward_kl


def _check_heads(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student attention {tuple(student.shape)} does not match the teacher's {tuple(teacher.shape)}: map layers "
            "with as many heads, or match relations, which do not need them"
        )


def attention_mse(student: Tensor, teacher: Tensor, visible: Tensor) -> Tensor:
    """Mean over heads and visible keys of the squared difference of the attention probabilities.

    Source: Jiao et al. 2019 (TinyBERT), arXiv:1909.10351, equation 7 (there on the scores before the softmax).
    """
    _check_heads(student, teacher)
    square = (widen(student) - widen(teacher)).square().mean(1).masked_fill(~visible, 0)
    return square.sum(-1) / visible.sum(-1).clamp(min=1)


def attention_kl(student: Tensor, teacher: Tensor, visible: Tensor) -> Tensor:
    """Mean over heads of KL(teacher || student) of the attention probabilities, in nats.

    Source: Wang et al. 2020 (MiniLM), arXiv:2002.10957, equation 4.
    """
    _check_heads(student, teacher)
    tiny = torch.finfo(torch.float32).tiny
    logs = [widen(side).clamp(min=tiny).log().masked_fill(~visible[:, None], -torch.inf) for side in (student, teacher)]
    return forward_kl(*logs).mean(1)


def _relation_kl(student: Tensor, teacher: Tensor, visible: Tensor, heads: int) -> Tensor:
    """Compute the KL between the softmaxes of the scaled products of a [B, L, D] with itself, per relation head."""
    if heads < 1:
        raise ValueError(f"heads must be 1 or more, got {heads}")
    logs = []
    for vectors in (student, teacher):
        width = vectors.shape[-1]
        if width % heads:
            raise ValueError(f"{width} columns cannot be split into {heads} relation heads; give `heads` a divisor")
        split = widen(vectors).view(*vectors.shape[:2], heads, width // heads).transpose(1, 2)
        with without_autocast(split.device):
            scores = split @ split.transpose(-1, -2) / (width // heads) ** 0.5
        logs.append(scores.masked_fill(~visible[:, None], -torch.inf))
    return forward_kl(*logs).mean(1)


def qkv(student: Sequence[Tensor], teacher: Sequence[Tensor], visible: Tensor, *, heads: int = 1) -> Tensor:
    """Mean over queries, keys and values of the KL between their relations to themselves, in nats.

    `heads`: relation heads R, 1 or more, a divisor of every width.

    Source: Wang et al. 2020 (MiniLMv2), arXiv:2012.15828, section 3.
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([_relation_kl(own, target, visible, heads) for own, target in pairs]).mean(0)


def values(student: Sequence[Tensor], teacher: Sequence[Tensor], visible: Tensor, *, heads: int = 1) -> Tensor:
    """The KL between the relations of the values to themselves alone, in nats.

    Source: Wang et al. 2020 (MiniLM), arXiv:2002.10957, equation 5.
    """
    return _relation_kl(student[2], teacher[2], visible, heads)


ATTENTION: dict[str, Callable[..., Tensor]] = {
    "kl": attention_kl,
    "mse": attention_mse,
}

RELATION: dict[str, Callable[..., Tensor]] = {
    "qkv": qkv,
    "values": values,
}

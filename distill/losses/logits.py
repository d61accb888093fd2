"""Divergences between the student's and the teacher's next-class distributions.

Every function takes logits `(student_logits, teacher_logits)` of shape [..., V] (the teacher's also as `TopK`), divides
both by `temperature` (above 0), computes in fp32 or wider and returns one value per position, shape [...], in nats
(`logit_mse`: squared logits). It raises ValueError for a parameter out of its range. Nothing here scales by
temperature², reduces over positions or knows about masks: `distill.losses.objective` does that, once, for every loss.

V: vocabulary or classes. T, S: the softmax of the teacher's and of the student's logits at the given temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from distill.losses.align import align
from distill.models.topk import TopK


def _log_probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    student, teacher = align(student_logits, teacher_logits, temperature)
    return student.log_softmax(-1), teacher.log_softmax(-1)


def _non_negative(value: Tensor) -> Tensor:
    """Remove the rounding error below zero, but keep the gradient, which `clamp` would cut off there."""
    return value - value.detach().clamp(max=0)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """Compute KL(P || Q) [...] from the logs of P and Q [..., V]."""
    return _non_negative((first.exp() * (first - second)).sum(-1))


def _skewed_kl(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    """Compute KL(P || alpha P + (1 - alpha) Q) [...] from the logs of P and Q [..., V]."""
    if not 0 <= alpha < 1:  # at 1 the mixture is P itself: a loss that is 0 everywhere and teaches nothing
        raise ValueError(f"alpha must be at least 0 and below 1, got {alpha}")
    if alpha == 0:
        return _kl(first, second)
    return _non_negative(-(first.exp() * _log_mixture(second - first, 1 - alpha, alpha)).sum(-1))


def _log_mixture(log_ratio: Tensor, weight: float, rest: float) -> Tensor:
    """log(weight * exp(log_ratio) + rest) with weight + rest = 1: exactly 0 at ratio 1 and finite at any ratio."""
    near = torch.log1p(weight * torch.expm1(log_ratio.clamp(-1, 1)))
    far = torch.logaddexp(log_ratio + math.log(weight), log_ratio.new_full((), math.log(rest)))
    return torch.where(log_ratio.abs() < 1, near, far)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(T || S) = sum T (log T - log S): covers all that the teacher would say; zero at equality.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2 (there as cross-entropy; the gradient is the same).
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return _kl(teacher, student)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(S || T) = sum S (log S - log T): the student may ignore what it cannot say, but says nothing of its own.

    Source: Gu et al. 2023 (MiniLLM), arXiv:2306.08543, section 2.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return _kl(student, teacher)


def symmetric_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """(KL(T || S) + KL(S || T)) / 2 = sum (T - S)(log T - log S) / 2.

    Source: Kullback and Leibler 1951, On information and sufficiency (there the sum, not the mean).
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return _non_negative(((teacher.exp() - student.exp()) * (teacher - student)).sum(-1) / 2)


def jsd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon: beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S.

    The formula itself fades to 0 at both ends of beta; divided by beta it tends to KL(T || S) for beta -> 0, divided
    by 1 - beta to KL(S || T) for beta -> 1. As in TRL, `beta=0` and `beta=1` therefore return those two limits,
    `forward_kl` and `reverse_kl`, and everything in between is the formula as it stands. `beta=0.5`: at most log 2.

    Source: Agarwal et al. 2023 (GKD), arXiv:2306.13649, section 2.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be between 0 and 1, got {beta}")
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    if beta in (0, 1):
        return _kl(student, teacher) if beta else _kl(teacher, student)
    log_ratio = teacher - student
    teacher_part = teacher.exp() * -_log_mixture(-log_ratio, 1 - beta, beta)  # T log(T / M)
    student_part = student.exp() * -_log_mixture(log_ratio, beta, 1 - beta)  # S log(S / M)
    return _non_negative((beta * teacher_part + (1 - beta) * student_part).sum(-1))


def skew_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, alpha: float = 0.1
) -> Tensor:
    """KL(T || alpha T + (1 - alpha) S): forward KL whose gradient stays bounded where the student says almost 0.

    `alpha`: from 0 (plain forward KL) up to, but not including, 1. At most -log alpha.

    Source: Ko et al. 2024 (DistiLLM), arXiv:2402.03898, section 3.1.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return _skewed_kl(teacher, student, alpha)


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, alpha: float = 0.1
) -> Tensor:
    """KL(S || (1 - alpha) T + alpha S): reverse KL that stays bounded where the teacher says almost 0.

    `alpha`: from 0 (plain reverse KL) up to, but not including, 1. At most -log alpha.

    Source: Ko et al. 2024 (DistiLLM), arXiv:2402.03898, section 3.1.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return _skewed_kl(student, teacher, alpha)


def total_variation(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Half of sum |S - T|: the largest difference in probability that any event can have, 0 to 1.

    Source: Wen et al. 2023 (f-DISTILL), arXiv:2307.15190.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return (student.exp() - teacher.exp()).abs().sum(-1) / 2


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """-sum T log S = KL(T || S) + entropy of T: same gradient as `forward_kl`, but not zero at equality.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return -(teacher.exp() * student).sum(-1)


def logit_mse(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Mean over V of the squared difference of the logits, each divided by the temperature.

    Scaled by temperature², as the objective does, it does not depend on the temperature.

    Source: Ba and Caruana 2014, arXiv:1312.6184 (there the sum over V, halved).
    """
    student, teacher = align(student_logits, teacher_logits, temperature)
    return (student - teacher).square().mean(-1)


def adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, head: float = 0.5
) -> Tensor:
    """Forward and reverse: g KL(T || S) + (1 - g) KL(S || T), g the share of sum |T - S| in the head of the teacher.

    The head are the fewest most likely tokens that hold `head` (between 0 and 1) of the teacher's probability. Forward
    KL is quick to fit the head and reverse KL the tail, so each position gets more of the one that it needs. g is part
    of the function and of its gradient (the authors' code holds it constant; near the teacher the difference is of
    third order). The tail of a `TopK` is no token, and is ranked after all that are.

    Source: Wu et al. 2024 (AKL), arXiv:2404.02657, section 4.
    """
    if not 0 < head < 1:
        raise ValueError(f"head must be between 0 and 1, got {head}")
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    target = teacher.exp()
    ranked, order = _ranks(target, teacher_logits).sort(-1, descending=True)
    before = ranked.cumsum(-1) - ranked  # `head` is reached when it is up to rounding
    in_head = torch.zeros_like(ranked).scatter(-1, order, (before < head * (1 - 1e-5)).to(ranked.dtype))
    gap = (target - student.exp()).abs()
    share = (gap * in_head).sum(-1) / gap.sum(-1).clamp(min=1e-12)
    return share * _kl(teacher, student) + (1 - share) * _kl(student, teacher)


def tail_aware_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, k: int = 1, beta: float = 2.0
) -> Tensor:
    """Forward KL with the tail of the teacher made louder: KL over the k most likely tokens + beta · that of the tail.

    With a the teacher's probability of all but its k most likely tokens, KL(T || S) = D1 + a D2: D1 compares the
    k tokens and the tail as one class, D2 the tokens of the tail among themselves, their probabilities rescaled to 1.
    This is D1 + beta a D2; `beta=1` is `forward_kl`. Of a `TopK` the tail is its other tokens and its last class, so
    its K has to be above k.

    Follows Dasgupta et al. 2026 (TAD), arXiv:2602.20816, by an excerpt of its section 2; the whole paper was not at
    hand. There beta is divided by the mean of a over the sequence, which a value per position knows nothing of: beta
    here is that quotient. They find a k of 5 to 10 best.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    most = student.shape[-1] - 2
    if not 1 <= k <= most:
        raise ValueError(f"k must be from 1 to {most}, so that the tail has two of the {most + 2} classes, got {k}")
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    target = teacher.exp()
    best = _ranks(target, teacher_logits).topk(k).indices
    top = torch.zeros_like(target, dtype=torch.bool).scatter(-1, best, True)
    rest = [
        side.masked_fill(top, torch.finfo(side.dtype).min).logsumexp(-1, keepdim=True) for side in (student, teacher)
    ]
    kept = (target * (teacher - student)).masked_fill(~top, 0).sum(-1)
    between = kept + (rest[1].exp() * (rest[1] - rest[0])).squeeze(-1)
    among = (target * (teacher - rest[1] - (student - rest[0]))).masked_fill(top, 0).sum(-1)
    return _non_negative(between) + beta * _non_negative(among)


def _ranks(probabilities: Tensor, teacher_logits: Tensor | TopK) -> Tensor:
    """Give the teacher's probabilities without gradient, to rank tokens; the tail of a `TopK` comes after them all."""
    ranks = probabilities.detach()
    return functional.pad(ranks[..., :-1], (0, 1), value=-1.0) if isinstance(teacher_logits, TopK) else ranks


LOGITS: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "symmetric_kl": symmetric_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "soft_cross_entropy": soft_cross_entropy,
    "logit_mse": logit_mse,
    "adaptive_kl": adaptive_kl,
    "tail_aware_kl": tail_aware_kl,
}

"""Distances between the student's and the teacher's hidden states.

Every function takes `(student, teacher)` of shape [..., D] and returns one value per position, shape [...], in fp32
(float64 stays float64), exactly zero at equality; it raises ValueError when the shapes differ. Masks, means over
positions and weights are the objective's.

D: hidden width, the same on both sides (a student of another width is projected first).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill.losses.align import widen

SHORTEST = 1e-6
"""Vectors shorter than this have no direction worth learning; dividing by their length would only blow up gradients."""


def _widen_both(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Widen both sides to fp32 or more; refuse shapes that differ, which broadcasting would hide."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student hidden states {tuple(student.shape)} do not match the teacher's {tuple(teacher.shape)}: "
            "map layers of the same width, or project the student's first"
        )
    return widen(student), widen(teacher)


def _length(vectors: Tensor) -> Tensor:
    """Measure the Euclidean length [..., 1]; 1 for vectors without a direction, so that dividing by it is harmless."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return torch.where(length > SHORTEST, length, 1.0)


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over D of (s - t)²: same direction and same size.

    Source: Jiao et al. 2019 (TinyBERT), arXiv:1909.10351, equation 8.
    """
    student, teacher = _widen_both(student, teacher)
    return (student - teacher).square().mean(-1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(s, t), 0 to 2: same direction, any size.

    Computed as half the squared distance of the unit vectors, which is the same number, but exactly 0 at equality and
    without cancellation near it. A zero vector counts as ½ away from every direction and 0 from another zero vector.

    Source: Sanh et al. 2019 (DistilBERT), arXiv:1910.01108.
    """
    student, teacher = _widen_both(student, teacher)
    return (student / _length(student) - teacher / _length(teacher)).square().sum(-1) / 2


def normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over D of (s/|s| - t/|t|)²: `cosine` times 2/D (at most 4/D), on the scale of `mse`.

    Source: Sun et al. 2019 (Patient KD), arXiv:1908.09355.
    """
    student, teacher = _widen_both(student, teacher)
    return (student / _length(student) - teacher / _length(teacher)).square().mean(-1)


def relative_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """|s - t|² / |t|²: the squared error as a share of the teacher, so that layers of any size weigh the same.

    1 for a student that says nothing (s = 0). Against a zero teacher vector, of which nothing is a share, it is |s|².

    Source: the normalised mean squared error of signal processing; no single paper.
    """
    student, teacher = _widen_both(student, teacher)
    return ((student - teacher) / _length(teacher)).square().sum(-1)


HIDDEN: dict[str, Callable[..., Tensor]] = {
    "mse": mse,
    "cosine": cosine,
    "normalized_mse": normalized_mse,
    "relative_mse": relative_mse,
}

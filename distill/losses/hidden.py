"""Distances between the student's and the teacher's hidden states.

Every function takes `(student, teacher)` of shape [..., D] and returns one value per position, shape [...], in fp32
(float64 stays float64), exactly zero at equality. Masks, means over positions and weights are the objective's.

D: hidden width, the same on both sides (a student of another width is projected first).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SHORTEST = 1e-6
"""Vectors shorter than this have no direction worth learning; dividing by their length would only blow up gradients."""


def _widened(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides in fp32 or wider. Raises ValueError when their shapes differ, where broadcasting would hide it."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student hidden states {tuple(student.shape)} do not match the teacher's {tuple(teacher.shape)}: "
            "map layers of the same width, or project the student's first"
        )
    kind = torch.promote_types(student.dtype, torch.float32)
    return student.to(kind), teacher.to(kind)


def _length(vectors: Tensor) -> Tensor:
    """Euclidean length [..., 1]; 1 for vectors without a direction, so that dividing by it is harmless."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return torch.where(length > SHORTEST, length, 1.0)


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over D of (s - t)²: same direction and same size.

    Args:
        student: [..., D].
        teacher: [..., D].

    Returns:
        [...] in squared activations.

    Raises:
        ValueError: the shapes differ.

    Source: Jiao et al. 2019 (TinyBERT), arXiv:1909.10351, equation 8.
    """
    student, teacher = _widened(student, teacher)
    return (student - teacher).square().mean(-1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(s, t): same direction, any size.

    Computed as half the squared distance of the unit vectors, which is the same number, but exactly 0 at equality and
    without cancellation near it. A zero vector counts as ½ away from every direction and 0 from another zero vector.

    Args:
        student: [..., D].
        teacher: [..., D].

    Returns:
        [...] between 0 and 2.

    Raises:
        ValueError: the shapes differ.

    Source: Sanh et al. 2019 (DistilBERT), arXiv:1910.01108.
    """
    student, teacher = _widened(student, teacher)
    return (student / _length(student) - teacher / _length(teacher)).square().sum(-1) / 2


def normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over D of (s/|s| - t/|t|)²: `cosine` times 2/D, on the scale of `mse`.

    Args:
        student: [..., D].
        teacher: [..., D].

    Returns:
        [...] between 0 and 4/D.

    Raises:
        ValueError: the shapes differ.

    Source: Sun et al. 2019 (Patient KD), arXiv:1908.09355.
    """
    student, teacher = _widened(student, teacher)
    return (student / _length(student) - teacher / _length(teacher)).square().mean(-1)


def relative_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """|s - t|² / |t|²: the squared error as a share of the teacher, so that layers of any size weigh the same.

    Against a zero teacher vector, of which nothing is a share, it is |s|².

    Args:
        student: [..., D].
        teacher: [..., D].

    Returns:
        [...], 1 for a student that says nothing (s = 0).

    Raises:
        ValueError: the shapes differ.

    Source: the normalised mean squared error of signal processing; no single paper.
    """
    student, teacher = _widened(student, teacher)
    return ((student - teacher) / _length(teacher)).square().sum(-1)


HIDDEN: dict[str, Callable[..., Tensor]] = {
    "mse": mse,
    "cosine": cosine,
    "normalized_mse": normalized_mse,
    "relative_mse": relative_mse,
}

"""Bring student and teacher to one vocabulary, one precision and one temperature, whatever form the teacher comes in.

V: vocabulary or classes. K: tokens that a cached teacher keeps for each position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.models.topk import TopK, with_tail


@dataclass(frozen=True)
class Positions:
    """The positions of a mask at which it is true."""

    index: Tensor
    """int64 [N], rising, into the flattened mask."""
    axes: int
    """Of the mask."""

    @classmethod
    def of(cls, mask: Tensor) -> Positions:
        """Find the positions of a mask; on a GPU the host waits for them."""
        return cls(mask.flatten().nonzero().squeeze(-1), mask.ndim)

    def select(self, values: Any) -> Any:
        """Select [N, ...] from a tensor (or `TopK`) that has the axes of the mask first."""
        if isinstance(values, TopK):
            return TopK(self.select(values.ids), self.select(values.log_probabilities))
        flat = values.flatten(0, self.axes - 1)
        # As many as there are at all: nothing is copied, nor sent back along an index.
        return flat if len(flat) == len(self.index) else flat.index_select(0, self.index)


def without_autocast(device: torch.device) -> torch.autocast:
    """Open a block whose matrix products autocast leaves in the dtype of their operands.

    Rounding them to bf16 is harmless in a model; in a loss it is larger than what tells a student from its teacher.
    """
    return torch.autocast(device.type, enabled=False)


def widen(tensor: Tensor) -> Tensor:
    """Widen to fp32; float64 stays float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def align(student_logits: Tensor, teacher_logits: Tensor | TopK, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Bring both sides to one vocabulary, one precision and one temperature.

    Vocabularies are padded to different lengths within one model family, so both are cut to the shared length:
    filling the shorter one with zeros would hand probability to tokens that do not exist.

    Args:
        student_logits: [..., V], any float type.
        teacher_logits: [..., V'], the same leading shape, or a `TopK`.
        temperature: divisor of the logits, > 0.

    Returns:
        Student and teacher logits [..., min(V, V')], or log-probabilities [..., K + 1] with the tail last, divided by
        the temperature; finite, in fp32 (float64 stays float64).

    Raises:
        ValueError: the leading shapes differ, or the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    shape = (teacher_logits.ids if isinstance(teacher_logits, TopK) else teacher_logits).shape
    if student_logits.shape[:-1] != shape[:-1]:
        raise ValueError(
            f"student and teacher logits are for different positions: {tuple(student_logits.shape)} "
            f"against {tuple(shape)}"
        )
    if isinstance(teacher_logits, TopK):
        student_logits = with_tail(student_logits, teacher_logits.ids)
        teacher_logits = teacher_logits.log_probabilities
    length = min(student_logits.shape[-1], teacher_logits.shape[-1])
    return _scale(student_logits[..., :length], temperature), _scale(teacher_logits[..., :length], temperature)


def _scale(logits: Tensor, temperature: float) -> Tensor:
    wide = widen(logits)
    # A forbidden class (-inf on both sides) must contribute 0; as infinities its log-ratio would be inf - inf = NaN.
    finite: Tensor = _Finite.apply(wide if temperature == 1 else wide / temperature)  # type: ignore[no-untyped-call]
    return finite


class _Finite(torch.autograd.Function):
    """-inf becomes the lowest number. The gradient passes as it is, which saves the two passes that `clamp` takes."""

    @staticmethod
    def forward(_ctx: Any, logits: Tensor) -> Tensor:
        return logits.clamp(min=torch.finfo(logits.dtype).min)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient

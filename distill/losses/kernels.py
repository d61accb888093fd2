"""Triton kernels for the common losses on logits: a row's value and its slope in two or three readings of the row.

The slope, which is the derivative of the loss by the student's logits, is written over the student's logits, in the
dtype that the matrix products take. No other tensor of that size exists. One program per position; sums over the
vocabulary are online, so a row of any length needs no more registers.

With s and t the probabilities of student and teacher, z the student's logits divided by the temperature, and a
divergence D = sum of v(log s, log t):  h = s · dD/ds  and  dD/dz = h - s · sum(h).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

NONE, FORWARD, REVERSE, SYMMETRIC, JSD, SKEW_FORWARD, SKEW_REVERSE, VARIATION, SOFT = range(9)
BLOCK, WARPS = 2048, 8
LOWEST = torch.finfo(torch.float32).min
_LOWEST = tl.constexpr(LOWEST)
_NONE, _FORWARD, _REVERSE, _SYMMETRIC = (tl.constexpr(code) for code in (NONE, FORWARD, REVERSE, SYMMETRIC))
_JSD, _SKEW_FORWARD, _SKEW_REVERSE = (tl.constexpr(code) for code in (JSD, SKEW_FORWARD, SKEW_REVERSE))
_VARIATION, _SOFT = tl.constexpr(VARIATION), tl.constexpr(SOFT)


@triton.jit
def _expm1(x):
    series = 1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7 * (1.0 + x / 8)))
    series = x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * series)))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1.0)


@triton.jit
def _log1p(y):
    ratio = y / (2.0 + y)
    square = ratio * ratio
    series = 1.0 / 7 + square * (1.0 / 9 + square * (1.0 / 11 + square * (1.0 / 13)))
    series = 2.0 * ratio * (1.0 + square * (1.0 / 3 + square * (1.0 / 5 + square * series)))
    return tl.where(tl.abs(y) < 0.5, series, tl.log(1.0 + y))


@triton.jit
def _log_mixture(log_ratio, weight, rest):
    """log(weight · exp(log_ratio) + rest), exactly 0 at ratio 1; as in `distill.losses.logits`."""
    near = _log1p(weight * _expm1(tl.minimum(tl.maximum(log_ratio, -1.0), 1.0)))
    one, other = log_ratio + tl.log(weight), tl.log(rest)
    far = tl.maximum(one, other) + tl.log(1.0 + tl.exp(-tl.abs(one - other)))
    return tl.where(tl.abs(log_ratio) < 1.0, near, far)


@triton.jit
def _scaled(logits, inverse):
    """Divide by the temperature; -inf becomes the lowest number, NaN stays."""
    scaled = logits * inverse
    return tl.where(scaled < _LOWEST, _LOWEST, scaled)


@triton.jit
def _capped(linear, cap, CAPPED: tl.constexpr):
    if CAPPED:
        growth = tl.exp(-2.0 * tl.abs(linear / cap))
        tanh = (1.0 - growth) / (1.0 + growth)
        linear = cap * tl.where(linear < 0, -tanh, tanh)
    return linear


@triton.jit
def _include(top, total, x):
    """Take one value per lane into a running maximum and the sum of exponentials above it."""
    step = tl.exp(-tl.abs(x - top))
    higher = x > top
    return tl.where(higher, x, top), tl.where(higher, total * step + 1.0, total + step)


@triton.jit
def _log_total(top, total):
    """Join the lanes: the maximum, and the logarithm of the sum of exponentials above it."""
    highest = tl.max(top, 0)
    return highest, tl.log(tl.sum(total * tl.exp(top - highest), 0))


@triton.jit
def _terms(own, target, amount, DIVERGENCE: tl.constexpr):
    """(log s, log t) -> v and h of each class."""
    s, t = tl.exp(own), tl.exp(target)
    gap = target - own
    if DIVERGENCE == _FORWARD:
        return t * gap, -t
    elif DIVERGENCE == _SOFT:
        return -t * own, -t
    elif DIVERGENCE == _REVERSE:
        return -s * gap, s * (1.0 - gap)
    elif DIVERGENCE == _SYMMETRIC:
        return 0.5 * (t - s) * gap, 0.5 * (s * (1.0 - gap) - t)
    elif DIVERGENCE == _JSD:
        by_student = -(1.0 - amount) * s * _log_mixture(gap, amount, 1.0 - amount)
        by_teacher = -amount * t * _log_mixture(-gap, 1.0 - amount, amount)
        return by_teacher + by_student, by_student
    elif DIVERGENCE == _SKEW_FORWARD:
        log_ratio = -_log_mixture(-gap, 1.0 - amount, amount)  # log(T / M)
        return t * log_ratio, -(1.0 - amount) * s * tl.exp(log_ratio)
    elif DIVERGENCE == _SKEW_REVERSE:
        log_ratio = -_log_mixture(gap, 1.0 - amount, amount)  # log(S / M)
        return s * log_ratio, s * (log_ratio + 1.0 - amount * tl.exp(log_ratio))
    else:
        sign = tl.where(s > t, 0.5, tl.where(s < t, -0.5, 0.0))
        return sign * (s - t), sign * s


@triton.jit
def _normalize(
    student, teacher, columns, compared, inverse, cap,
    DIVERGENCE: tl.constexpr, ALL: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First reading: maximum and log-sum of student, teacher and, with ALL, of the student's whole row as it is."""
    lanes = tl.arange(0, BLOCK)
    empty, none = tl.full((BLOCK,), _LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    top_s, sum_s, top_t, sum_t, top_all, sum_all = empty, none, empty, none, empty, none
    for start in range(0, columns, BLOCK):
        place = start + lanes
        z = _capped(tl.load(student + place, place < columns, other=float("-inf")), cap, CAPPED)
        if DIVERGENCE != _NONE:
            u = tl.load(teacher + place, place < compared, other=float("-inf"))
            top_s, sum_s = _include(top_s, sum_s, tl.where(place < compared, _scaled(z, inverse), _LOWEST))
            top_t, sum_t = _include(top_t, sum_t, _scaled(u, inverse))
        if ALL:
            top_all, sum_all = _include(top_all, sum_all, tl.where(place < columns, _scaled(z, 1.0), _LOWEST))
    top_s, log_s = _log_total(top_s, sum_s)
    top_t, log_t = _log_total(top_t, sum_t)
    top_all, log_all = _log_total(top_all, sum_all)
    return top_s, log_s, top_t, log_t, top_all, log_all


@triton.jit
def _sum_h(
    student, teacher, compared, inverse, amount, cap, top_s, log_s, top_t, log_t,
    DIVERGENCE: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Second reading, for divergences whose sum of h is not known beforehand."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, compared, BLOCK):
        place = start + lanes
        inside = place < compared
        z = _capped(tl.load(student + place, inside, other=float("-inf")), cap, CAPPED)
        u = tl.load(teacher + place, inside, other=float("-inf"))
        _, h = _terms(_scaled(z, inverse) - top_s - log_s, _scaled(u, inverse) - top_t - log_t, amount, DIVERGENCE)
        total += tl.where(inside, h, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _row(
    student, teacher, slope, labels, values, factor, label_factor,
    student_pitch, teacher_pitch, slope_pitch, columns, compared, inverse, scale, amount, cap,
    DIVERGENCE: tl.constexpr, LABELS: tl.constexpr, CAPPED: tl.constexpr, ONE_SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one position. ONE_SUM: the cross-entropy is over the columns and temperature of the divergence."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_pitch
    teacher += row * teacher_pitch
    slope += row * slope_pitch
    lanes = tl.arange(0, BLOCK)
    top_s, log_s, top_t, log_t, top_all, log_all = _normalize(
        student, teacher, columns, compared, inverse, cap, DIVERGENCE, LABELS and not ONE_SUM, CAPPED, BLOCK
    )
    if ONE_SUM:
        top_all, log_all = top_s, log_s
    total_h = -1.0
    if DIVERGENCE != _NONE and DIVERGENCE != _FORWARD and DIVERGENCE != _SOFT:
        total_h = _sum_h(
            student, teacher, compared, inverse, amount, cap, top_s, log_s, top_t, log_t, DIVERGENCE, CAPPED, BLOCK
        )
    by_term = tl.load(factor) * scale * inverse if DIVERGENCE != _NONE else 0.0
    label, by_label = -1, 0.0
    if LABELS:
        label = tl.load(labels + row)
        by_label = tl.where(label >= 0, tl.load(label_factor), 0.0)
        chosen = _capped(tl.load(student + tl.maximum(label, 0)), cap, CAPPED)
        nll = tl.where(label >= 0, log_all + (top_all - _scaled(chosen, 1.0)), 0.0)
        tl.store(values + 2 * row + 1, nll)
    lanes_v = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        place = start + lanes
        z = _capped(tl.load(student + place, place < columns, other=float("-inf")), cap, CAPPED)
        by_logit = tl.zeros((BLOCK,), tl.float32)
        if DIVERGENCE != _NONE:
            inside = place < compared
            u = tl.load(teacher + place, inside, other=float("-inf"))
            own, target = _scaled(z, inverse) - top_s - log_s, _scaled(u, inverse) - top_t - log_t
            v, h = _terms(own, target, amount, DIVERGENCE)
            lanes_v += tl.where(inside, v, 0.0)
            by_logit += tl.where(inside, by_term * (h - tl.exp(own) * total_h), 0.0)
        if LABELS:
            by_logit += by_label * (tl.exp(_scaled(z, 1.0) - top_all - log_all) - tl.where(place == label, 1.0, 0.0))
        if CAPPED:
            by_logit *= 1.0 - (z / cap) * (z / cap)
        # A slope of two bytes lies over logits that all threads must have read.
        tl.debug_barrier()
        tl.store(slope + place, by_logit.to(slope.dtype.element_ty), place < columns)
    if DIVERGENCE != _NONE:
        total = tl.sum(lanes_v, 0)
        tl.store(values + 2 * row, tl.where(total < 0.0, 0.0, total))  # rounding; NaN stays


@dataclass(frozen=True)
class Work:
    """Terms of one chunk: a divergence, the cross-entropy with labels, or both."""

    divergence: int = NONE
    """One of the codes above."""
    factor: Tensor | None = None
    """Of the divergence in the loss, [] on the device."""
    temperature: float = 1.0
    scale: float = 1.0
    """On the divergence, temperature² or 1."""
    amount: float = 0.0
    """The divergence's own parameter, beta or alpha."""
    label_factor: Tensor | None = None
    """Of the cross-entropy in the loss, [] on the device; None: no cross-entropy."""


def write_slopes(
    student: Tensor, teacher: Tensor | None, labels: Tensor, slope: Tensor, compared: int, cap: float | None, work: Work
) -> Tensor:
    """Write the slope and return both values of each position.

    Args:
        student: Logits before the cap, fp32 [n, V]; rows may be padded.
        teacher: Logits, fp32 [n, V'].
        labels: int64 [n], negative: none.
        slope: [n, V], written; may lie over `student`, each row from the same address.
        compared: Columns that the divergence compares.
        cap: Of the student's logits.
        work: The terms.

    Returns:
        The divergence without its scale and the cross-entropy, fp32 [n, 2]; 0 where there is none.
    """
    rows, columns = student.shape
    values = student.new_zeros(rows, 2)
    if isinstance(student, FakeTensor):  # only memory is counted
        return values
    absent: Any = values
    with_labels, with_teacher = work.label_factor is not None, work.divergence != NONE
    with torch.cuda.device(student.device) if student.is_cuda else nullcontext():
        _row[(rows,)](
            student, teacher if with_teacher else absent, slope, labels, values,
            work.factor if with_teacher else absent, work.label_factor if with_labels else absent,
            student.stride(0), teacher.stride(0) if teacher is not None else 0, slope.stride(0), columns, compared,
            1.0 / work.temperature, float(work.scale), float(work.amount), float(cap or 1.0),
            DIVERGENCE=work.divergence, LABELS=with_labels, CAPPED=cap is not None,
            ONE_SUM=with_labels and with_teacher and compared == columns and work.temperature == 1.0,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return values

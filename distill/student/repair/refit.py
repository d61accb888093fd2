"""Correct the output weights of the kept neurons for those that were removed, by least squares.

X [N, F] are the activations of a teacher layer's F neurons over the N calibration positions, S the F' neurons that the
student keeps, W [D, F] and b [D] the teacher's output weights and bias. A fit starts from the weights that are there
and finds a change to them, pulled towards 0 by the ridge, so on the calibration sample it is never worse than none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill.models.forward import Batch
from distill.models.memory import split_groups
from distill.models.mlp import NeuronAxis, mlps_of
from distill.models.plan import StudentPlan
from distill.student.repair.moments import LayerError, Moments, Pass, moment_bytes, solve_ridge


@dataclass(frozen=True)
class Output:
    """Output weights [D, F or F'] and bias [D] (None: the family has none) of one MLP or one of its experts."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Piece:
    """The unit of a fit: the neurons of one MLP, or of one of its experts."""

    layer: int
    """Index in the student."""
    expert: int | None
    teacher: NeuronAxis
    student: NeuronAxis
    kept: Tensor
    """[F'] indices of the kept neurons."""

    def output(self, mlp: NeuronAxis) -> Output:
        """The piece's output in one of the two models, in float64."""
        weight = mlp.weight_out if self.expert is None else mlp.weight_out[self.expert]
        return Output(weight.double(), None if mlp.bias_out is None else mlp.bias_out.double())


def fit_bias(moments: Moments, target: Output, start: Output, kept: Tensor, _ridge: float) -> Output:
    """Add W[:, removed] E[x_removed] to the bias: the mean error becomes 0 (FLAP, An et al. 2024, arXiv 2312.11983)."""
    if start.bias is None or target.bias is None:
        return start
    return replace(start, bias=target.bias + _missing(target, start, kept) @ moments.mean())


def fit_refit(moments: Moments, target: Output, start: Output, kept: Tensor, ridge: float) -> Output:
    """Fit W_S + argmin_Δ ||X Wᵀ - X_S (W_S + Δ)ᵀ||² + ridge · mean diagonal · ||Δ||²; about the means with a bias."""
    products = moments.about(centred=start.bias is not None)
    cross = products[kept] @ _missing(target, start, kept).T
    change = solve_ridge(products[kept][:, kept], cross, ridge)
    return fit_bias(moments, target, replace(start, weight=start.weight + change.T), kept, ridge)


FITS: dict[str, Callable[[Moments, Output, Output, Tensor, float], Output]] = {"bias": fit_bias, "refit": fit_refit}
"""In the order of the steps."""


def _missing(target: Output, start: Output, kept: Tensor) -> Tensor:
    """Subtract the student's output weights from the target's, [D, F]."""
    missing = target.weight.clone()
    missing[:, kept] -= start.weight
    return missing


def output_error(moments: Moments, target: Output, output: Output, kept: Tensor) -> float:
    """Sum ||X Wᵀ + b - X_S W'ᵀ - b'||² over the positions."""
    missing = _missing(target, output, kept)
    total = ((missing @ moments.products) * missing).sum()
    if target.bias is not None and output.bias is not None:
        rest = target.bias - output.bias
        total = total + 2 * rest @ (missing @ moments.total) + moments.count * rest.square().sum()
    return max(0.0, float(total))


@dataclass(frozen=True)
class Fitted:
    """The new output of a piece, in the student's dtype, and its error."""

    piece: Piece
    output: Output
    positions: int
    before: float
    """Squared error over the positions before the fit."""
    after: float
    """The same after it."""


def fit_outputs(
    teacher: Any, student: Any, plan: StudentPlan, batches: Sequence[Batch], ridge: float, asked: list[str], most: int
) -> dict[str, list[Fitted]]:
    """Compute the outputs after each of the asked fits, one after the other; nothing is changed yet.

    Args:
        teacher: Gives the activations and the targets.
        student: On the teacher's device.
        plan: The plan that the student was cut by.
        batches: The calibration sample; gone through once for each group of pieces.
        ridge: As in `solve_ridge`.
        asked: Names from FITS, in the order of the table.
        most: Bytes of moments to hold at a time.
    """
    fitted: list[list[Fitted]] = []
    pieces = _pieces(teacher, student, plan)
    for group in split_groups(pieces, lambda piece: moment_bytes(piece.teacher.width), most):
        pairs = zip(group, _neuron_moments(teacher, group, batches), strict=True)
        fitted += [_fit_piece(piece, moments, ridge, asked) for piece, moments in pairs]
    return {name: [fits[number] for fits in fitted] for number, name in enumerate(asked)}


def _fit_piece(piece: Piece, moments: Moments, ridge: float, asked: list[str]) -> list[Fitted]:
    """Fit a piece; one result for each of the asked fits."""
    target, current, fits = piece.output(piece.teacher), piece.output(piece.student), []
    for name in asked:
        before = output_error(moments, target, current, piece.kept)
        proposal = _round_as_stored(FITS[name](moments, target, current, piece.kept, ridge), piece.student)
        after = output_error(moments, target, proposal, piece.kept)
        if after > before:  # only the rounding to a narrow dtype can do that
            proposal, after = current, before
        stored = replace(proposal, weight=proposal.weight.to("cpu", piece.student.weight_out.dtype))
        fits.append(Fitted(piece, stored, moments.count, before, after))
        current = proposal
    return fits


def _pieces(teacher: Any, student: Any, plan: StudentPlan) -> list[Piece]:
    teacher_mlps, student_mlps = mlps_of(teacher), mlps_of(student)
    pieces = []
    for index, layer in enumerate(plan.layers):
        if layer.neurons is None:
            continue
        kept = torch.tensor(layer.neurons, device=teacher.device)
        make = partial(Piece, index, teacher=teacher_mlps[layer.teacher_layer], student=student_mlps[index])
        experts = [make(expert, kept=neurons) for expert, neurons in enumerate(kept)] if kept.ndim == 2 else []
        pieces += experts or [make(None, kept=kept)]
    return pieces


def _neuron_moments(teacher: Any, group: Sequence[Piece], batches: Sequence[Batch]) -> list[Moments]:
    step = Pass(teacher, [piece.teacher.width for piece in group])
    number_of = {(piece.layer, piece.expert or 0): number for number, piece in enumerate(group)}

    def add_neurons(layer: int, neurons: Tensor, positions: Tensor | None, expert: int) -> None:
        if (layer, expert) in number_of:
            step.add(number_of[layer, expert], neurons, positions)

    mlps = {piece.layer: piece.teacher for piece in group}
    return step.run(batches, [mlp.watch(partial(add_neurons, layer)) for layer, mlp in mlps.items()])


def _round_as_stored(output: Output, mlp: NeuronAxis) -> Output:
    """Round an output to the student's dtype."""
    dtype = mlp.weight_out.dtype
    return Output(output.weight.to(dtype).double(), None if output.bias is None else output.bias.to(dtype).double())


def write_output(fitted: Fitted) -> None:
    """Put a fitted output into the student."""
    piece, output = fitted.piece, fitted.output
    weight = piece.student.weight_out if piece.expert is None else piece.student.weight_out[piece.expert]
    weight.copy_(output.weight)
    if output.bias is not None and piece.student.bias_out is not None:
        piece.student.bias_out.copy_(output.bias)


def layer_errors(plan: StudentPlan, fitted: Sequence[Fitted]) -> list[LayerError]:
    """Add up the errors of one fit by layer, those of a layer's experts together."""
    errors = []
    for index in sorted({fit.piece.layer for fit in fitted}):
        fits = [fit for fit in fitted if fit.piece.layer == index]
        values = max(1, sum(fit.positions for fit in fits)) * fits[0].piece.teacher.weight_out.shape[-2]
        before, after = sum(fit.before for fit in fits) / values, sum(fit.after for fit in fits) / values
        errors.append(LayerError(index, plan.kept_layers[index], before, after))
    return errors

"""Gradients of a loss with respect to a gate on each neuron, one example at a time.

Neuron i of a layer gives x_ti at position t, and g_ti is the loss's gradient with respect to it. Multiply the neuron
with a gate: the loss's gradient with respect to the gate, at 1, is c_i = Σ_t g_ti x_ti. The output projection turns x
into W x, so c_i = Σ_d W_di · (dL/dW)_di: only the output weights need a gradient, whatever the rest of the model is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import InputError
from distill.models.forward import Batch, Capture, forward, to_device
from distill.models.layout import StackName
from distill.models.mlp import NeuronAxis, placed_mlps
from distill.models.precision import autocast_for
from distill.student.calibration.column_sums import column_sums
from distill.student.calibration.removal import LabelLoss
from distill.student.calibration.sample import content_seed, draw_classes, examples, real_positions

Gate = tuple[StackName, int, NeuronAxis]


def gradient_sums(
    model: Any, sample: list[Batch], loss: LabelLoss | None, sets: bool = False, precision: str = "fp32"
) -> dict[str, Tensor]:
    """Sum over examples |c| and c² for the labels' loss, and of c² for labels drawn from the teacher.

    The second kind is about KL(teacher ‖ pruned). At the teacher itself this KL is at its minimum, 0, and so is its
    gradient: the first-order Taylor term vanishes. The leading term of closing a gate is ½ · E[c²] over labels drawn
    from the teacher's own distribution (the gate's true Fisher information), with the loss summed over the positions
    of an example. One label is drawn per position, by a generator seeded from the example's content; with `sets`, where
    the model has logits [B, V], a yes or no for each class.

    Raises:
        InputError: The model gives no logits.
    """
    gates = placed_mlps(model)
    weights = [mlp.parameter_out for _, _, mlp in gates]
    sums = _empty_sums(gates, weights[0].device)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for batch in sample:
            for example in examples(batch, sets):
                with torch.enable_grad(), autocast_for(model, precision):
                    losses = _losses(model, to_device(example, model.device), loss, sets)
                _add_gradients(losses, gates, weights, sums)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return sums


def _empty_sums(gates: list[Gate], device: torch.device) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    for side, index, mlp in gates:
        shape = (*mlp.weight_out.shape[:-2], mlp.width)
        shapes |= {f"{side}.{index}.{name}": shape for name in ("task_abs", "task_square", "kl_square")}
        shapes |= {f"{side}.{name}_examples": () for name in ("task", "kl")}
    return {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}


def _losses(model: Any, example: Batch, loss: LabelLoss | None, sets: bool) -> dict[str, Tensor]:
    """Compute the loss of drawn labels, and that of the example's own where it has some, with gradient."""
    outputs = forward(model, example, Capture())
    logits = outputs.logits
    if logits is None or logits.shape[-1] < 2:
        raise InputError("gradient statistics need a head that gives logits over two or more classes")
    drawn_from = torch.stack([torch.zeros_like(logits), logits], -1).flatten(0, 1) if sets else logits
    losses = {"kl": _loss_of_draw(drawn_from, example)}
    if loss is not None and "labels" in example:
        value, count = loss(outputs, example)
        losses |= {"task": value} if count else {}
    return losses


def _add_gradients(
    losses: dict[str, Tensor], gates: list[Gate], weights: list[nn.Parameter], sums: dict[str, Tensor]
) -> None:
    for kind, value in losses.items():
        gradients = torch.autograd.grad(value, weights, retain_graph=kind == "kl" and "task" in losses)
        for (side, index, mlp), gradient in zip(gates, gradients, strict=True):
            upright = gradient.mT if mlp.layout.storage == "conv1d" else gradient
            gate = column_sums(torch.mul, mlp.weight_out.detach(), upright)
            sums[f"{side}.{index}.{kind}_square"] += gate.square()
            if kind == "task":
                sums[f"{side}.{index}.task_abs"] += gate.abs()
        for side in {side for side, _, _ in gates}:
            sums[f"{side}.{kind}_examples"] += 1


def _loss_of_draw(logits: Tensor, example: Batch) -> Tensor:
    """Draw one class at every real position and sum -log p of them."""
    rows = logits.flatten(0, -2)
    if logits.ndim == 3:
        mask = real_positions(example, "main")
        rows = rows if mask is None else rows[mask.flatten()]
    classes = draw_classes(rows.detach(), content_seed(example))
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return nn.functional.cross_entropy(wide, classes, reduction="sum")

"""What the loss of the labels becomes when layers are taken out; nothing is rebuilt, hooks hand their input on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.family import layers_of, layout_of
from distill.models.forward import Batch, layer_input
from distill.models.layout import StackName
from distill.recipe.schema import Layers
from distill.student.calibration.sample import without_labels
from distill.student.layers import protected_layers

LabelLoss = Callable[[Tensor, Batch], tuple[Tensor, int]]
"""(logits, batch) -> the labels' loss summed over valid positions, and how many there are."""


def losses_without(model: Any, side: StackName, sample: list[Batch], loss: LabelLoss) -> dict[str, Tensor]:
    """Summed loss after removing each layer of one stack alone, and the number of valid positions."""
    depth = len(layers_of(model, side))
    totals = [_loss_without(model, side, {layer}, sample, loss) for layer in range(depth)]
    return {
        f"{side}.without": torch.stack([total for total, _ in totals]),
        f"{side}.without_positions": totals[0][1],
    }


def greedy_removals(
    model: Any,
    side: StackName,
    sample: list[Batch],
    loss: LabelLoss,
    wanted: Layers,
    reduce: Callable[[Tensor], Tensor],
) -> list[int]:
    """Layers in the order of removal: each time the one without which the loss is lowest, given those removed before.

    Of equal ones the later is removed. Source: SLEB (Song et al. 2024, arXiv 2402.09025).

    Raises:
        InputError: Fewer layers may be removed than have to be.
    """
    depth = len(layers_of(model, side))
    stay = protected_layers(depth, wanted, bool(layout_of(model).stack(side).keep_first))
    order: list[int] = []
    assert isinstance(wanted.keep, int), "a list of layers is not a policy"
    while len(order) < depth - wanted.keep:
        candidates = [layer for layer in range(depth) if layer not in order and layer not in stay]
        totals = [_loss_without(model, side, {*order, layer}, sample, loss)[0] for layer in candidates]
        losses = reduce(torch.stack(totals)).tolist()
        order.append(min(zip(losses, candidates, strict=True), key=lambda pair: (pair[0], -pair[1]))[1])
    return order


@torch.no_grad()
def _loss_without(
    model: Any, side: StackName, gone: Iterable[int], sample: list[Batch], loss: LabelLoss
) -> tuple[Tensor, Tensor]:
    """Summed loss and valid positions, [] each in float64."""
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    positions = torch.zeros_like(total)
    with _skipped([layers_of(model, side)[layer] for layer in gone]):
        for cpu_batch in sample:
            batch = {name: tensor.to(model.device) for name, tensor in cpu_batch.items()}
            value, count = loss(model(**without_labels(batch)).logits, batch)
            total += value.double()
            positions += count
    return total, positions


@contextmanager
def _skipped(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Layers that return their input. They still run: what they hand on beside the hidden states stays what it was."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        states = layer_input(args, kwargs)
        return states if isinstance(output, Tensor) else (states, *output[1:])

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""Task loss with layers skipped. A hook makes each skipped layer return its input, so no model is rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.family import layers_of, protected_layers
from distill.models.forward import Batch, Capture, Outputs, forward, layer_input, to_device
from distill.models.layout import StackName
from distill.recipe.schema import Layers

LabelLoss = Callable[[Outputs, Batch], tuple[Tensor, int]]
"""(outputs, batch) -> the labels' loss summed over valid positions, and how many there are."""


def losses_without(model: Any, side: StackName, sample: list[Batch], loss: LabelLoss) -> dict[str, Tensor]:
    """Sum the loss after removing each layer of one stack alone, and count the valid positions."""
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
    """Order layers by removal: each time the one without which the loss is lowest, given those removed before.

    Of equal ones the later is removed. Source: SLEB (Song et al. 2024, arXiv 2402.09025).

    Raises:
        InputError: Fewer layers may be removed than have to be.
    """
    depth = len(layers_of(model, side))
    stay = protected_layers(model, side, wanted)
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
    """Sum the loss and count valid positions without some layers, [] each in float64."""
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    positions = torch.zeros_like(total)
    with skip_layers([layers_of(model, side)[layer] for layer in gone]):
        for cpu_batch in sample:
            batch = to_device(cpu_batch, model.device)
            value, count = loss(forward(model, batch, Capture(stop_at_head=True)), batch)
            total += value.double()
            positions += count
    return total, positions


@contextmanager
def skip_layers(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Make layers return their input. They still run: what they return beside the hidden states stays what it was."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        states = layer_input(args, kwargs)
        return states if isinstance(output, Tensor) else (states, *output[1:])

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

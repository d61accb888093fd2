"""Exponential moving average (EMA) of the trainable weights, in fp32 (Polyak & Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distill.models.dtensor import shard_like


class Ema:
    """w' = d · w' + (1 - d) · w after every step, d = min(decay, (1 + step) / (10 + step))."""

    def __init__(self, model: nn.Module, decay: float, master: Callable[[Tensor], Tensor] = Tensor.detach):
        """Start with the weights that there are.

        Args:
            model: Its trainable parameters are averaged.
            decay: d.
            master: Gives a parameter's fp32 weights: where the model holds them in bf16, small steps show only there.
        """
        self.decay, self.master = decay, master
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.values = {name: master(p).clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int, skip: Tensor) -> None:
        """Move towards the weights after `step` steps; does nothing where `skip` [] is 1."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        weight = share * (1 - skip)
        for name, parameter in self.parameters.items():
            self.values[name].add_((self.master(parameter) - self.values[name]) * weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model the average for its weights inside the block."""
        last = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(last[name])

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Give the model the average for good."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.values[name])

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint has to hold."""
        return dict(self.values)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        self.values = {name: shard_like(tensors[name], own) for name, own in self.parameters.items()}

"""The teacher as a callable: a batch in, and out what the objective compares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from distill.models.forward import Batch, Capture, Outputs, device_of, forward, to_device
from distill.models.head import OutputHead
from distill.models.mixture import MixtureHead
from distill.models.precision import autocast_for


class LiveTeacher:
    """A live teacher: frozen, in eval mode, beside the student on its device.

    It is never given to `Accelerator.prepare`: that would put it in every checkpoint, and DDP refuses a module without
    trainable parameters.
    """

    def __init__(self, model: Any, capture: Capture, device: torch.device, precision: str = "fp32"):
        self.precision = precision
        """That of a recipe, which fp32 weights are multiplied in; others compute in their own dtype."""
        self.model = model.requires_grad_(False).eval()
        if self.model.device != device:  # 8-bit models cannot be moved
            self.model = self.model.to(device)
        self.device, self.capture = device, capture
        self._head: OutputHead | MixtureHead | None = None

    @property
    def models(self) -> list[Any]:
        """The one model."""
        return [self.model]

    @property
    def width(self) -> int:
        """Of its hidden states."""
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        """Run one forward pass without gradient; what is wanted of it comes back on the device of the batch."""
        with autocast_for(self.model, self.precision):
            outputs, origin = forward(self.model, to_device(batch, self.device), self.capture), device_of(batch)
        if origin == self.device:
            return outputs
        if self._head is None:  # it is large, and always the same
            self._head = to_device(outputs.head, origin)
        return replace(to_device(replace(outputs, head=None), origin), head=self._head)

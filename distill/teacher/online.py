"""The teacher as a callable: a batch in, logits and the asked-for layer outputs out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from distill.models.layout import layers_of
from distill.models.outputs import Batch, Outputs, captured, moved


class OnlineTeacher:
    """A live teacher: frozen, in eval mode, beside the student on its device.

    It is never given to `Accelerator.prepare`: that would put it in every checkpoint, and DDP refuses a module without
    trainable parameters.
    """

    def __init__(self, model: Any, layers: Iterable[int], device: torch.device):
        self.model = model.requires_grad_(False).eval()
        if self.model.device != device:  # 8-bit models cannot be moved
            self.model = self.model.to(device)
        self.device = device
        self.layers = list(layers)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        """Logits and the outputs of the asked-for layers, without gradient, on the device of the batch."""
        own = moved(batch, self.device)
        with captured(layers_of(self.model), self.layers) as hidden:
            output = self.model(input_ids=own["input_ids"], attention_mask=own["attention_mask"])
        found = Outputs(logits=output.logits, hidden=dict(hidden))
        return moved(found, batch["input_ids"].device)

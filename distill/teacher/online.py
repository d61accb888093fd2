"""The teacher as a callable: a batch in, and out what the objective compares."""

from __future__ import annotations

from typing import Any

import torch

from distill.models.outputs import Batch, Outputs, Wanted, run


class OnlineTeacher:
    """A live teacher: frozen, in eval mode, beside the student on its device.

    It is never given to `Accelerator.prepare`: that would put it in every checkpoint, and DDP refuses a module without
    trainable parameters.
    """

    def __init__(self, model: Any, wanted: Wanted, device: torch.device):
        self.model = model.requires_grad_(False).eval().to(device)
        self.wanted = wanted

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        """What is wanted of one forward pass, without gradient."""
        return run(self.model, batch, self.wanted)

"""The teacher as a callable: a batch in, and out what the objective compares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from distill.models.head import OutputHead
from distill.models.outputs import Batch, Outputs, Wanted, moved, run
from distill.models.prefix import shared_layers


class OnlineTeacher:
    """A live teacher: frozen, in eval mode, beside the student on its device.

    It is never given to `Accelerator.prepare`: that would put it in every checkpoint, and DDP refuses a module without
    trainable parameters.
    """

    def __init__(self, model: Any, wanted: Wanted, device: torch.device):
        self.model = model.requires_grad_(False).eval()
        if self.model.device != device:  # 8-bit models cannot be moved
            self.model = self.model.to(device)
        self.device, self.wanted = device, wanted
        self._head: OutputHead | None = None

    def share(self, student: Any, wanted: Wanted) -> int:
        """Run the first layers once for both models, where they are equal and do not learn; how many that are.

        Args:
            student: What does not learn is frozen. It is trained in fp32, so nothing is shared with another teacher.
            wanted: What is read of the student; layers whose insides are read are not shared.
        """
        inside = [*wanted.attention, *wanted.relations]
        shared = shared_layers(student, self.model) if self.model.dtype == torch.float32 else 0
        count = min([shared, *inside])
        self.wanted = replace(self.wanted, prefix=count)
        return count

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        """What is wanted of one forward pass, without gradient, on the device of the batch."""
        found, there = run(self.model, moved(batch, self.device), self.wanted), batch["input_ids"].device
        if there == self.device:
            return found
        if self._head is None:  # it is large, and always the same
            self._head = moved(found.head, there)
        return replace(moved(replace(found, head=None), there), head=self._head)

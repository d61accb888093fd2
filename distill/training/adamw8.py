"""AdamW with moments of 8 bits, by bitsandbytes; bf16 parameters have fp32 masters, as in `masters`."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.optim import AdamW8bit
from torch import Tensor

from distill.training.masters import CHUNK, join, split

BLOCK = 256
"""Weights that share one scale; parameters of less than 4,096 keep fp32 moments. Both are settings of bitsandbytes."""


class MasterAdamW8bit(AdamW8bit):  # type: ignore[misc]  # bitsandbytes has no types
    """AdamW8bit (Dettmers et al. 2022, arXiv 2110.02861) that steps the fp32 masters of bf16 parameters."""

    def __init__(self, groups: Any, rests: dict[Tensor, Tensor], **options: Any):
        """Take over what the rounding of each bf16 parameter left; others are stepped as bitsandbytes does."""
        super().__init__(groups, **options)
        self.rests = rests
        self.non_castable_tensor_keys |= {"rest"}

    @torch.no_grad()
    def init_state(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
        """Make the moments of a parameter, with its rest beside them."""
        super().init_state(group, p, gindex, pindex)
        if p in self.rests:
            self.state[p]["rest"] = self.rests.pop(p).to(p.device)

    @torch.no_grad()
    def update_step(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
        """Step one parameter, a piece of its master at a time."""
        state = self.state[p]
        if "rest" not in state:
            super().update_step(group, p, gindex, pindex)
            return
        state["step"] += 1
        size = CHUNK.get(p.device.type, CHUNK["cuda"])
        assert p.grad is not None and size % BLOCK == 0
        flat = [each.view(-1) for each in (p.data, state["rest"], state["state1"], state["state2"])]
        for start in range(0, p.numel(), size):
            weight, rest, *moments = (each[start : start + size] for each in flat)
            master = join(weight, rest)
            grad = p.grad.reshape(-1)[start : start + size].float()
            self._step_master(master, grad, moments, state, slice(start // BLOCK, -(-(start + size) // BLOCK)), group)
            for target, new in zip((weight, rest), split(master), strict=True):
                target.copy_(new)

    def _step_master(
        self, master: Tensor, grad: Tensor, moments: list[Tensor], state: Any, blocks: slice, group: Any
    ) -> None:
        (beta1, beta2), eps, step = group["betas"], group["eps"], state["step"]
        lr, decay = group["lr"], group["weight_decay"]
        if moments[0].dtype == torch.float32:
            functional.optimizer_update_32bit(
                "adam", grad, master, moments[0], beta1, eps, step, lr, moments[1], beta2, weight_decay=decay
            )
            return
        scales = [state[name][blocks] for name in ("absmax1", "absmax2")]
        maps = [state[name] for name in ("qmap1", "qmap2")]
        functional.optimizer_update_8bit_blockwise(
            "adam", grad, master, *moments, beta1, beta2, 0.0, 0.0, eps, step, lr, *maps, *scales, decay
        )

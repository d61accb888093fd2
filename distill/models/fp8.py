"""Linear maps of a frozen model with operands of 8 bits in floating point, which recent GPUs multiply fastest.

A weight has a scale per row, found once; what it is multiplied with has one per position, found in each pass. M
positions, K numbers read, N written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.models.family import all_layers

FORMAT = torch.float8_e4m3fn
MULTIPLE = 16
"""Both sides of a weight have to be multiples of it."""
CAPABILITY = (8, 9)
"""Compute capability of the first GPUs that multiply such numbers."""


class Fp8Linear(nn.Linear):
    """Stands in for a linear map; multiplies to bf16, and gives that in the dtype of what it reads.

    `weight` is a shape and a dtype without values: models ask it for these, and convert what they multiply with it.
    """

    eight: Tensor
    """[N, K]"""
    scale: Tensor
    """[N, 1]"""

    def __init__(self, linear: nn.Linear):
        dtype = linear.weight.dtype
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta", dtype=dtype)
        self.weight.requires_grad_(False)
        self.bias = linear.bias
        for name, tensor in zip(("eight", "scale"), rounded(linear.weight.detach()), strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.eval()

    def forward(self, states: Tensor) -> Tensor:
        """Multiply states [..., K] with the weight, [..., N]."""
        rows, scale = rounded(states.flatten(0, -2))
        kind: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        product = torch._scaled_mm(rows, self.eight.T, scale, self.scale.T, **kind)
        product = product if self.bias is None else product + self.bias
        return product.view(*states.shape[:-1], -1).to(states.dtype)


def rounded(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows [M, K] to 8 bits; returns them, the largest of each row at the top of the range, and scales [M, 1]."""
    wide = values.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * 2**10)
    scale = scale / torch.finfo(FORMAT).max
    return (wide / scale).to(FORMAT), scale


@torch.no_grad()
def quantise_layers(model: Any) -> tuple[int, int]:
    """Put 8-bit maps in place of the linear maps of all layers; embeddings, norms and heads stay.

    Args:
        model: On its device, in bf16; changed in place.

    Returns:
        The number of maps that were replaced, and of weights in the layers that were not: odd sizes, and experts.
    """
    done, left = 0, 0
    for layer in all_layers(model):
        for name, module in list(layer.named_modules()):
            weight = getattr(module, "weight", None)
            even = isinstance(weight, Tensor) and all(size % MULTIPLE == 0 for size in weight.shape)
            if type(module) is nn.Linear and even:
                layer.set_submodule(name, Fp8Linear(module))
                done += 1
            else:
                left += sum(own.ndim > 1 for own in module.parameters(recurse=False))
    return done, left


def fault_of(device: torch.device) -> str:
    """Say why a device does not multiply numbers of 8 bits; empty where it does."""
    if device.type != "cuda":
        return "needs a GPU"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        wanted, own = (".".join(map(str, version)) for version in (CAPABILITY, found))
        return f"needs a GPU of compute capability {wanted}, and this one has {own}"
    try:
        kind: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        Fp8Linear(nn.Linear(MULTIPLE, MULTIPLE, **kind))(torch.ones(1, MULTIPLE, **kind))
    except (RuntimeError, ValueError) as error:
        return f"does not work with this torch and GPU ({str(error).splitlines()[0]})"
    return ""

"""The precision that a model computes in."""

from __future__ import annotations

from typing import Any

import torch

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_for(model: Any, precision: str) -> torch.autocast:
    """Make the context in which a model computes in a recipe's precision.

    Weights in half precision, or in 8 bits, decide for themselves; only products of fp32 weights are given in less.
    An autocast that is on around the context is off inside where this one is.
    """
    device = model.device.type
    if not takes_autocast(model, precision):
        return torch.autocast(device, enabled=False)
    return torch.autocast(device, dtype=DTYPES[precision])


def takes_autocast(model: Any, precision: str) -> bool:
    """Tell whether a recipe's precision changes how a model computes."""
    return precision != "fp32" and model.dtype == torch.float32


def describe_precision(model: Any, precision: str) -> str:
    """Name what a model computes in: `bf16 autocast over float32 weights`, or the dtype of its weights."""
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{precision} autocast over {dtype} weights" if takes_autocast(model, precision) else dtype

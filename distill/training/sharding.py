"""A frozen model spread over the processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard


def shard(model: Any, layers: Iterable[nn.Module]) -> Any:
    """Leave each process a part of every layer's weights; they are put together when the layer runs (FSDP2).

    By hand and not through Accelerate, which prepares a model for training, together with an optimizer, and would put
    it into every checkpoint.

    Args:
        model: Frozen, on the device of this process; every process calls it equally often.
        layers: Its repeated parts.
    """
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    return model

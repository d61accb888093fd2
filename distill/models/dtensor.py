"""Full tensors and local shards of DTensors, which FSDP2 makes of parameters."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on every rank (collective); any other is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a sharded tensor, sharing its memory; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, target: Tensor) -> Tensor:
    """Move `value` to the device of `target` and shard it alike.

    Args:
        value: Whole and the same on every process, or sharded like `target` already.
        target: Of the same shape.
    """
    value = value.to(target.device)
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    return value

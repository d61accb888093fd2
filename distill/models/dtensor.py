"""Tensors of which each process may hold a part (DTensor, as FSDP2 makes them of parameters)."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or all shards of it put together; then every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """The tensor itself, or what this process holds of it; both share memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, target: Tensor) -> Tensor:
    """`value` on the device of `target` and sharded as it is.

    Args:
        value: Whole and the same on every process, or sharded like `target` already.
        target: Of the same shape.
    """
    value = value.to(target.device)
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    return value

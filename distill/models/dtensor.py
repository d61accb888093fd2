"""Sharded tensors (DTensor, as FSDP2 makes them of parameters): gather, reach and make them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather all shards of a tensor; one that is not sharded is returned as it is. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return the shard that this rank holds, or the tensor where it is not sharded; memory is shared."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, target: Tensor) -> Tensor:
    """Move `value` to the device of `target` and shard it alike.

    Args:
        value: Whole and the same on every rank, or sharded like `target` already.
        target: Of the same shape.
    """
    value = value.to(target.device)
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    return value


def shard_model(model: Any, layers: Iterable[nn.Module]) -> Any:
    """Shard a frozen model over the ranks; each layer's weights are gathered when it runs (FSDP2).

    By hand and not through Accelerate, which prepares a model for training, together with an optimizer, and would put
    it into every checkpoint.

    Args:
        model: Frozen, on the device of this rank; every rank calls it equally often.
        layers: Its repeated parts.
    """
    # Without a mesh torch takes what it was built for, a GPU, also where none is used.
    mesh = init_device_mesh(next(model.parameters()).device.type, (get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model

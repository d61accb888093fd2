"""A model and its optimizer as named tensors and plain numbers, and back; sharded tensors stay sharded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import RunError
from distill.models.dtensor import shard_like

DERIVED_GROUP_KEYS = ("lr", "weight_decay")
"""Entries of groups that follow from the recipe and the step."""

Numbers = Mapping[str, Any]
"""Plain numbers beside the tensors of a checkpoint: `moments`, `groups` and `scaler`."""


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """List each parameter and persistent buffer under its first name; tied ones share storage and come once."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the model. Raises RunError when their names or shapes are not the model's."""
    expected = own_tensors(model)
    odd = tensors.keys() ^ expected.keys()
    odd |= {name for name in tensors.keys() & expected.keys() if tensors[name].shape != expected[name].shape}
    if odd:
        raise RunError(f"the checkpoint holds other tensors than the model: {', '.join(sorted(odd)[:4])}")
    for name, tensor in expected.items():
        tensor.copy_(shard_like(tensors[name], tensor))


def named_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    """Name all that the optimizer keeps of a parameter, tensors and numbers: `PARAMETER/MOMENT`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, moments in optimizer.state.items():
        yield from ((f"{names[parameter]}/{moment}", value) for moment, value in moments.items() if value is not None)


def group_numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """List, group by group, the numbers that the optimizer keeps for all of it and has changed itself."""
    return [
        {
            key: value
            for key, value in group.items()
            if isinstance(value, int | float) and key not in DERIVED_GROUP_KEYS and value != optimizer.defaults.get(key)
        }
        for group in optimizer.param_groups
    ]


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Any], groups: list[dict[str, float]]
) -> None:
    """Restore what `named_moments` and `group_numbers` gave."""
    named = dict(model.named_parameters())
    index_of = {p: index for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    states: dict[int, dict[str, Any]] = {}
    for key, value in moments.items():
        name, moment = key.rsplit("/", 1)
        like_parameter = isinstance(value, Tensor) and value.shape == named[name].shape
        states.setdefault(index_of[named[name]], {})[moment] = (
            shard_like(value, named[name]) if like_parameter else value
        )
    for group, numbers in zip(optimizer.param_groups, groups, strict=True):
        group |= numbers
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})

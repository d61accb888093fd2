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


def own_tensors(model: nn.Module, *, frozen: bool = True) -> dict[str, Tensor]:
    """List each parameter and persistent buffer under its first name; tied ones share storage and come once.

    Args:
        model: The module.
        frozen: Parameters that do not learn are listed, too.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        left_out = not frozen and isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if id(tensor) not in seen and not left_out:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, frozen: bool = True) -> None:
    """Copy what `own_tensors` listed into the model. Raises RunError when names or shapes are not the model's."""
    expected = own_tensors(model, frozen=frozen)
    odd = tensors.keys() ^ expected.keys()
    odd |= {name for name in tensors.keys() & expected.keys() if tensors[name].shape != expected[name].shape}
    if odd:
        raise RunError(f"the checkpoint holds other tensors than the model: {', '.join(sorted(odd)[:4])}")
    for name, tensor in expected.items():
        tensor.copy_(shard_like(tensors[name], tensor))


def named_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    """Name all that the optimizer keeps of a parameter, tensors and numbers: `PARAMETER/MOMENT`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    seen: set[int] = set()
    for parameter, moments in optimizer.state.items():
        for moment, value in moments.items():
            if value is None:
                continue
            # One for all, as the codes of 8 bits, comes as many times: a file holds no tensor twice.
            shared = isinstance(value, Tensor) and id(value) in seen
            seen.add(id(value))
            yield f"{names[parameter]}/{moment}", value.clone() if shared else value


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
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index_of = {parameter: index for index, parameter in enumerate(parameters)}
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
    for index, own in states.items():
        loaded = optimizer.state[parameters[index]]
        for moment, value in own.items():
            # Loading gave them the parameter's dtype; the rests of masters and moments of 8 bits have one of their own.
            if isinstance(value, Tensor) and loaded[moment].dtype != value.dtype:
                loaded[moment] = value.to(loaded[moment].device)

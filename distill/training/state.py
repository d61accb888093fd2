"""A model, its optimizer and its loss scale as named tensors and back; sharded ones stay sharded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import RunError
from distill.models.dtensor import shard_like

SCALAR_MARK = "#"
"""Marks optimizer state that is a plain number, so that it becomes one again."""
DERIVED_GROUP_KEYS = ("lr", "weight_decay")
"""Entries of groups that follow from the recipe and the step."""


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
def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the model. Raises RunError when their names or shapes are not the model's."""
    expected = own_tensors(model)
    odd = tensors.keys() ^ expected.keys()
    odd |= {name for name in tensors.keys() & expected.keys() if tensors[name].shape != expected[name].shape}
    if odd:
        raise RunError(f"the checkpoint holds other tensors than the model: {', '.join(sorted(odd)[:4])}")
    for name, tensor in expected.items():
        tensor.copy_(shard_like(tensors[name], tensor))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name every moment that the optimizer keeps: `PARAMETER/MOMENT` -> tensor."""
    names = [name for name, _ in _trained(model, optimizer)]
    tensors: dict[str, Tensor] = {}
    states: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    for index, moments in states.items():
        for moment, value in moments.items():
            if isinstance(value, Tensor):
                tensors[f"{names[index]}/{moment}"] = value
            elif value is not None:
                tensors[f"{names[index]}/{moment}{SCALAR_MARK}"] = torch.tensor(value, dtype=torch.float64)
    return tensors | group_tensors(optimizer)


def group_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name the numbers that the optimizer keeps for all of a group and has changed itself: `#N/KEY` -> tensor []."""
    return {
        f"{SCALAR_MARK}{index}/{key}": torch.tensor(value, dtype=torch.float64)
        for index, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if isinstance(value, int | float) and key not in DERIVED_GROUP_KEYS and value != optimizer.defaults.get(key)
    }


def load_groups(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Restore what `group_tensors` gave; returns the other tensors."""
    for name, tensor in tensors.items():
        if name.startswith(SCALAR_MARK):
            index, key = name.removeprefix(SCALAR_MARK).split("/", 1)
            group = optimizer.param_groups[int(index)]
            group[key] = type(group.get(key, 0.0))(tensor.item())
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(SCALAR_MARK)}


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` gave."""
    tensors = load_groups(optimizer, tensors)
    trained = _trained(model, optimizer)
    index_of = {name: index for index, (name, _) in enumerate(trained)}
    states: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, moment = key.rsplit("/", 1)
        index = index_of[name]
        parameter = trained[index][1]
        value = shard_like(tensor, parameter) if tensor.shape == parameter.shape else tensor
        states.setdefault(index, {})[moment.removesuffix(SCALAR_MARK)] = (
            tensor.item() if SCALAR_MARK in moment else value
        )
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def scaler_tensors(scaler: Any) -> dict[str, Tensor]:
    """Name the state of a `torch.amp.GradScaler` (fp16): the scale, how long it has held, how it moves."""
    state: dict[str, Any] = scaler.state_dict() if scaler is not None else {}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()}


def load_scaler(scaler: Any, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `scaler_tensors` gave; a checkpoint without it leaves the scaler as it is."""
    if scaler is not None and tensors:
        kinds = {name: type(value) for name, value in scaler.state_dict().items()}
        scaler.load_state_dict({name: kinds[name](tensor.item()) for name, tensor in tensors.items()})


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """List the optimizer's parameters with their names, in the order of its state."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [(names[id(parameter)], parameter) for group in optimizer.param_groups for parameter in group["params"]]

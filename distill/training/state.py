"""A model and its optimizer as named tensors and back, whole also where each process holds a shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import RunError
from distill.models.dtensor import shard_like

NUMBER = "#"
"""Marks optimizer state that is a plain number, so that it becomes one again."""
OURS = ("lr", "weight_decay")
"""Entries of groups that follow from the recipe and the step."""


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Each parameter and persistent buffer under its first name; tied ones share storage and are listed once."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


@torch.no_grad()
def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into the model. Raises RunError when they are not the model's."""
    expected = own_tensors(model)
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())
        raise RunError(f"the checkpoint holds other tensors than the model: {', '.join(odd[:4])}")
    for name, tensor in expected.items():
        tensor.copy_(shard_like(tensors[name], tensor))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`PARAMETER/MOMENT` -> tensor, for every moment that the optimizer keeps."""
    names = [name for name, _ in _trained(model, optimizer)]
    tensors: dict[str, Tensor] = {}
    states: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    for index, moments in states.items():
        for moment, value in moments.items():
            if isinstance(value, Tensor):
                tensors[f"{names[index]}/{moment}"] = value
            elif value is not None:
                tensors[f"{names[index]}/{moment}{NUMBER}"] = torch.tensor(value, dtype=torch.float64)
    return tensors | group_tensors(optimizer)


def group_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`#N/KEY` -> number that the optimizer keeps for all of a group of parameters, where it has changed it itself."""
    return {
        f"{NUMBER}{index}/{key}": torch.tensor(value, dtype=torch.float64)
        for index, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if isinstance(value, int | float) and key not in OURS and value != optimizer.defaults.get(key)
    }


def load_groups(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put back what `group_tensors` gave; returns the other tensors."""
    for name, tensor in tensors.items():
        if name.startswith(NUMBER):
            index, key = name.removeprefix(NUMBER).split("/", 1)
            group = optimizer.param_groups[int(index)]
            group[key] = type(group.get(key, 0.0))(tensor.item())
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(NUMBER)}


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put moments back."""
    tensors = load_groups(optimizer, tensors)
    trained = _trained(model, optimizer)
    index_of = {name: index for index, (name, _) in enumerate(trained)}
    states: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, moment = key.rsplit("/", 1)
        index = index_of[name]
        parameter = trained[index][1]
        value = shard_like(tensor, parameter) if tensor.shape == parameter.shape else tensor
        states.setdefault(index, {})[moment.removesuffix(NUMBER)] = tensor.item() if NUMBER in moment else value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def scaler_tensors(scaler: Any) -> dict[str, Tensor]:
    """State of a `torch.amp.GradScaler` (fp16): the scale, how long it has held, how it moves. None: nothing."""
    state: dict[str, Any] = scaler.state_dict() if scaler is not None else {}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()}


def load_scaler(scaler: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put the state of a scaler back; a checkpoint without one leaves it as it is."""
    if scaler is not None and tensors:
        kinds = {name: type(value) for name, value in scaler.state_dict().items()}
        scaler.load_state_dict({name: kinds[name](tensor.item()) for name, tensor in tensors.items()})


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """The optimizer's parameters with their names, in the order of its state."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [(names[id(parameter)], parameter) for group in optimizer.param_groups for parameter in group["params"]]

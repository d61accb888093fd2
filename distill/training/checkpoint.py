"""Checkpoints that are either complete or not there.

A checkpoint is written into a temporary folder, every file is flushed to the disk, a manifest of sha256 sums is written
last, and one rename publishes it. Only safetensors and JSON: loading runs no code. At least two are kept, and a start
takes the newest one whose manifest holds, naming those it passes over.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.errors import RunError
from distill.rundir import fsync_folder, sha256_of, write_text

KEEP = 2
MANIFEST = "MANIFEST.json"
CONSTRAINT = "constraint.safetensors"


@dataclass
class TrainState:
    """Everything that survives a restart besides weights and optimizer moments.

    Sample order, learning rate and random numbers are functions of the step, so the step is nearly all there is.
    """

    step: int = 0
    """Optimizer steps done."""
    examples: int = 0
    """Examples seen."""
    seconds: float = 0.0
    """Time spent in training, over all restarts."""


def save(
    folder: Path,
    state: TrainState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: str,
    constraint: Mapping[str, Tensor] | None = None,
) -> Path:
    """Publish `folder/step-XXXXXXXX`; keeps the newest two of this training, and never touches those of another.

    Args:
        folder: The run's checkpoint folder.
        state: Where training stands.
        model: The unwrapped module; its tied tensors are stored once.
        optimizer: The unwrapped optimizer.
        identity: Fingerprint of what is being trained; a start with another one ignores this checkpoint.
        constraint: The tensors of what is held to after every step, e.g. masks.
    """
    final = folder / f"step-{state.step:08d}"
    temporary = folder / f".tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {name: tensor.contiguous() for name, tensor in _own_tensors(model).items()}
    save_file(weights, temporary / "model.safetensors")
    save_file(_optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
    if constraint:
        save_file(dict(constraint), temporary / CONSTRAINT)
    write_text(temporary / "state.json", json.dumps({"identity": identity, **asdict(state)}, indent=1))
    sums = {file.name: sha256_of(file) for file in sorted(temporary.iterdir())}
    for name in sums:
        _fsync(temporary / name)
    write_text(temporary / MANIFEST, json.dumps(sums, indent=1))
    fsync_folder(temporary)
    _make_way(final, identity)
    os.rename(temporary, final)
    fsync_folder(folder)
    for old in [found for found in published(folder) if _identity_of(found) == identity][:-KEEP]:
        shutil.rmtree(old)
    return final


def _make_way(final: Path, identity: str) -> None:
    """The same step of this training did not verify and is replaced; that of another training is kept beside."""
    if not final.exists():
        return
    other = _identity_of(final)
    if other is None or other == identity:
        shutil.rmtree(final)
    else:
        os.rename(final, final.with_name(f"{final.name}.{other[:8]}"))


def _identity_of(checkpoint: Path) -> str | None:
    try:
        return str(json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["identity"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def published(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def newest_valid(folder: Path, identity: str, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is intact and belongs to this training; every other newer one is named to `say`."""
    for stale in folder.glob(".tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)  # another process of this run may be sweeping too
    for checkpoint in reversed(published(folder)):
        fault = fault_of(checkpoint, identity)
        if fault is None:
            return checkpoint
        say(f"checkpoint {checkpoint.name} is passed over: {fault}")
    return None


def fault_of(checkpoint: Path, identity: str) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        sums = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name in dict.fromkeys(("model.safetensors", "optimizer.safetensors", "state.json", *sums)):
            if sha256_of(checkpoint / name) != sums[name]:
                return f"{name} does not match its checksum"
        found = _identity_of(checkpoint)
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"it is incomplete ({type(error).__name__}: {error})"
    return None if found == identity else "it was made from another recipe, teacher or data"


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Put a verified checkpoint's tensors into model and optimizer; returns where training stood."""
    load_weights(checkpoint, model)
    tensors = load_file(checkpoint / "optimizer.safetensors")
    current = optimizer.state_dict()
    index_of = {name: index for index, name in enumerate(_parameter_names(model, optimizer))}
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, moment = key.rsplit("/", 1)
        states.setdefault(index_of[name], {})[moment] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": current["param_groups"]})
    fields = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    fields.pop("identity")
    return TrainState(**fields)


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights into the model. Raises RunError when the tensors are not the model's."""
    tensors = load_file(checkpoint / "model.safetensors")
    expected = _own_tensors(model)
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())
        raise RunError(f"{checkpoint.name} holds other tensors than the model: {', '.join(odd[:4])}")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])


def load_constraint(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors that were saved as `constraint`; none when there were none."""
    file = checkpoint / CONSTRAINT
    return load_file(file) if file.exists() else {}


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Each parameter and persistent buffer under its first name; tied ones share storage and are listed once."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters in the order of its state indices."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = _parameter_names(model, optimizer)
    tensors: dict[str, Tensor] = {}
    states: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    for index, moments in states.items():
        for moment, value in moments.items():
            tensors[f"{names[index]}/{moment}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())

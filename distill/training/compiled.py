"""Compile the layers of student and teacher, one layer at a time (regional compilation).

Layers share what is compiled: torch keeps it by code object, which transformers has one of for all layers, and takes it
again for every layer of the same class and shapes, so that the first step waits for one layer of each shape. Only the
forward of a layer is compiled and not the module, so hooks on layers, DDP and FSDP stay outside of the graph. With the
second length that comes lengths become symbols: no later one is compiled for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from distill.models.family import all_layers
from distill.recipe.sections import Compile

if TYPE_CHECKING:
    from distill.losses import Objective

BACKEND = "inductor"
COMPILERS = ("torch._dynamo", "torch._inductor", "triton")
"""Where the classes of a compiler's errors are."""
KINDS_OF_CALL = 16
"""Versions of a layer at most: with gradient and without, in training and evaluation, of one length and of any, with a
mask and without; rounded up, as torch goes back to plain layers without a word where there are more."""


@dataclass
class CompiledLayers:
    """Layers whose forward is compiled at present."""

    title: str
    say: Callable[[str], None]
    layers: list[nn.Module] = field(default_factory=list)

    def compile(self, layers: Sequence[nn.Module]) -> None:
        """Compile layers when they first run."""
        shared: dict[Callable[..., Any], Callable[..., Any]] = {}
        for layer in layers:
            plain = type(layer).forward
            if plain not in shared:
                shared[plain] = torch.compile(plain, backend=BACKEND)
            layer.forward = MethodType(shared[plain], layer)
        self.layers = list(layers)

    def remove(self) -> None:
        """Give the layers their own forward back."""
        for layer in self.layers:
            vars(layer).pop("forward", None)
        self.layers = []

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Run the layers as they are during the block, for what they are not compiled for."""
        compiled = [(layer, vars(layer).pop("forward")) for layer in self.layers]
        try:
            yield
        finally:
            for layer, forward in compiled:
                layer.forward = forward

    def caused(self, error: Exception) -> bool:
        """Tell whether an error comes from compiling layers, or from what was compiled."""
        return bool(self.layers) and is_compilers(error)

    def give_up(self, error: Exception | None) -> None:
        """Go on with plain layers, and say why; without an error another rank had one."""
        self.remove()
        self.say(f"{self.title}: the layers run as they are, they cannot be compiled: {in_short(error)}")


def is_compilers(error: Exception) -> bool:
    """Tell whether a compiler raised an error."""
    by_compiler = type(error).__module__.startswith(COMPILERS)
    return by_compiler or isinstance(error, torch._dynamo.exc.TorchDynamoException)


def is_wanted(choice: Compile, device: torch.device) -> bool:
    """Tell whether layers on a device are compiled by this choice."""
    return choice is True or (choice == "auto" and device.type == "cuda")


def in_short(error: Exception | None) -> str:
    """Shorten what the compiler says: who raised, and the first line of it."""
    return " ".join(str(error).split("\n")[:2]).strip() if error else "another rank failed"


@contextmanager
def compiled_layers(
    choice: Compile, models: Sequence[Any], objective: Objective, accelerator: Accelerator, title: str, say: Any
) -> Iterator[CompiledLayers]:
    """Compile the layers of models during the block, where that is wanted.

    Args:
        choice: `training.compile`; "auto": on a GPU, unless something reads or gathers inside of layers.
        models: Student and teacher, where they run.
        objective: What is compared.
        accelerator: Of the training.
        title: Of the training.
        say: Receives a line for what is not compiled.
    """
    compiled = CompiledLayers(title, say)
    chosen = [model for model in models if is_wanted(choice, model.device)]
    if chosen and choice == "auto" and (reason := _reason_against(objective, accelerator)):
        say(f"{title}: the layers are not compiled: {reason}")
        chosen = []
    if not chosen:
        yield compiled
        return
    found = [getattr(layer, "_checkpoint_wrapped_module", layer) for model in chosen for layer in all_layers(model)]
    layers = [layer for layer in found if "forward" not in vars(layer)]
    if len(layers) < len(found):
        say(f"{title}: {len(found) - len(layers)} layers are not compiled, something else has replaced their forward")
    config: Any = torch._dynamo.config
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        # Versions of earlier trainings count as well. A family that reads the index of a layer has one for each.
        setattr(config, name, getattr(config, name) + KINDS_OF_CALL * len(layers))
    compiled.compile(layers)
    try:
        yield compiled
    finally:
        compiled.remove()


def _reason_against(objective: Objective, accelerator: Accelerator) -> str | None:
    """Say why `auto` leaves layers alone; None where it does not."""
    if objective.student.attention or objective.student.relations:
        return "match: attention and relations read inside of them"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return "DeepSpeed gathers weights inside of them"
    return None

"""What a forward pass hands on: logits and the raw outputs of the layers that somebody asked for.

Shapes: B examples, L positions, D hidden width, V classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
"""`input_ids` [B, L], `attention_mask` [B, L], `labels` [B] or [B, L] (-100: unlabelled or padding)."""


@dataclass(frozen=True)
class Outputs:
    """Results of one forward pass."""

    logits: Tensor
    """[B, V] (sequence heads) or [B, L, V] (token heads)."""
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """Layer index -> that layer's own output [B, L, D], before any final norm."""


T = TypeVar("T")


def moved(value: T, device: torch.device) -> T:
    """A batch or outputs with every tensor in them on a device."""
    new: Any = value
    if isinstance(value, Tensor):
        new = value.to(device, non_blocking=True)
    elif isinstance(value, dict):
        new = {key: moved(item, device) for key, item in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        new = replace(value, **{part.name: moved(getattr(value, part.name), device) for part in fields(value)})
    return cast("T", new)


def first_tensor(output: Any) -> Tensor:
    """The hidden states of a layer's return value, which is a tensor or a tuple that starts with one."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def captured(layers: nn.ModuleList | list[nn.Module], indices: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs of `layers[i]` for i in `indices` during one forward pass.

    Hooks see the raw layer output; `output_hidden_states` would keep every layer and, in transformers 5, returns the
    last one after the final norm. The hooks are gone when the block ends, so a recomputation during backward
    (activation checkpointing) cannot fire them again.
    """
    found: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found[index] = first_tensor(output)

        return hook

    handles = [layers[index].register_forward_hook(keep(index)) for index in sorted(set(indices))]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()

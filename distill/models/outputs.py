"""What a forward pass hands on: logits and the raw outputs of the layers that somebody asked for.

Shapes: B examples, L positions, D hidden width, V classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

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


def first_tensor(output: Any) -> Tensor:
    """The hidden states of a layer's return value, which is a tensor or a tuple that starts with one."""
    return output if isinstance(output, Tensor) else output[0]


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a layer was called with, as a forward hook sees its arguments."""
    states = args[0] if args else kwargs["hidden_states"]
    assert isinstance(states, Tensor)
    return states


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

"""What a forward pass hands on: what the objective compares, and nothing else.

Shapes: B examples, L positions, D hidden width, V classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from inspect import signature
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from distill.models.attention import watch_maps, watch_projections
from distill.models.family import layers_of
from distill.models.head import OutputHead, output_head, stopped_at_head, unrounded_classes

Batch = dict[str, Tensor]
"""`input_ids` [B, L], `attention_mask` [B, L], `labels` [B] or [B, L] (`UNLABELLED`: none, or padding)."""

UNLABELLED = -100
"""The label of what has none, as in torch and transformers."""


READ = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "position_ids")
"""The parts of a batch that models read; `input_ids` and `attention_mask` are always there."""


@dataclass(frozen=True)
class Capture:
    """What of a forward pass is to be kept."""

    hidden: Sequence[int] = ()
    """Layers whose output is wanted; -1 stands for what goes into the first one."""
    attention: Sequence[int] = ()
    """Layers whose attention probabilities are wanted."""
    relations: Sequence[int] = ()
    """Layers whose queries, keys and values are wanted."""
    stop_at_head: bool = False
    """Give `last` and `head` instead of logits, where the form of the model's head is known."""


@dataclass(frozen=True)
class Outputs:
    """Results of one forward pass: logits, or what logits are made from."""

    logits: Tensor | None
    """[B, V] (sequence heads), [B, L, V] (token heads), [B, 2, L] (start and end of an answer); None where `last` and
    `head` stand for them."""
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """Layer index -> that layer's own output [B, L, D], before any final norm; -1 -> the first layer's input."""
    last: Tensor | None = None
    """[B, L, D] what the output head reads."""
    head: OutputHead | None = None
    attention: dict[int, Tensor] = field(default_factory=dict)
    """Layer index -> attention probabilities [B, H, L, L]."""
    relations: dict[int, list[Tensor]] = field(default_factory=dict)
    """Layer index -> queries, keys and values, [B, L, D'] each."""


def forward(model: Any, batch: Batch, wanted: Capture) -> Outputs:
    """Run one forward pass of a transformers model."""
    head = output_head(model) if wanted.stop_at_head else None
    inputs = {name: batch[name] for name in READ if name in batch}
    if "position_ids" in inputs:
        # Packed: transformers tells documents apart by positions that start anew, and only where there is no mask.
        del inputs["attention_mask"]
    # Keys and values are for generation; with a cache transformers would not look for documents either.
    options = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
    with capture(model, wanted) as found:
        if head is None:
            with unrounded_classes(model):
                return replace(found, logits=_logits(model(**inputs, **options)))
        with stopped_at_head(model) as read:
            model(**inputs, **options)
    return replace(found, last=read[0], head=head)


def _logits(output: Any) -> Tensor:
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], 1)
    logits: Tensor = output.logits
    return logits


T = TypeVar("T")


def to_device(value: T, device: torch.device) -> T:
    """A batch or outputs with every tensor in them on a device."""
    new: Any = value
    if isinstance(value, Tensor):
        # To the host it must be complete: nobody waits for the device before reading it there.
        new = value.to(device, non_blocking=device.type != "cpu")
    elif isinstance(value, dict):
        new = {key: to_device(item, device) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        new = type(value)(to_device(item, device) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        new = replace(value, **{part.name: to_device(getattr(value, part.name), device) for part in fields(value)})
    return cast("T", new)


def first_tensor(output: Any) -> Tensor:
    """The hidden states of a layer's return value, which is a tensor or a tuple that starts with one."""
    return output if isinstance(output, Tensor) else output[0]


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a layer was called with, as a forward hook sees its arguments."""
    states = args[0] if args else kwargs["hidden_states"]
    assert isinstance(states, Tensor)
    return states


@contextmanager
def capture(model: Any, wanted: Capture) -> Iterator[Outputs]:
    """Fill in what is wanted of the layers during one forward pass.

    Hooks see the raw layer output; `output_hidden_states` would keep every layer and, in transformers 5, returns the
    last one after the final norm. The hooks are gone when the block ends, so a recomputation during backward
    (activation checkpointing) cannot fire them again.
    """
    found, layers = Outputs(None), layers_of(model)

    def output_of(index: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found.hidden[index] = first_tensor(output)

        return hook

    def input_of(_module: nn.Module, inputs: Any, named: Any) -> None:
        found.hidden[-1] = inputs[0] if inputs else named["hidden_states"]

    handles = [layers[index].register_forward_hook(output_of(index)) for index in wanted.hidden if index >= 0]
    if -1 in wanted.hidden:
        handles.append(layers[0].register_forward_pre_hook(input_of, with_kwargs=True))
    for layer in wanted.attention:
        handles.append(watch_maps(model, layer, partial(found.attention.__setitem__, layer)))
    for layer in wanted.relations:
        handles += watch_projections(model, layer, found.relations.setdefault(layer, [torch.empty(0)] * 3).__setitem__)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()

"""Run a model on a batch: select its inputs, capture tensors of its layers, return logits or the input of the head.

Shapes: B examples, L positions, D hidden width, H heads, V classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, partial
from inspect import getmodule, signature
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distill.errors import InputError
from distill.models.attention import watch_maps, watch_projections
from distill.models.family import layers_of
from distill.models.head import OutputHead, output_head, stop_at_head, widen_class_logits
from distill.models.layout import StackName
from distill.models.mixture import MixtureHead
from distill.models.padding import UNPADDED, padding_known

Batch = dict[str, Tensor]
"""`input_ids`, `attention_mask` [B, L], `labels` [B] or [B, L] (`UNLABELLED`: none, or padding). Where an example has
several texts, one after the other, B is their number, and `texts` has an entry per example. See also padding.py."""

UNLABELLED = -100
"""The label of positions without one, as in torch and transformers."""
MODEL_INPUTS = (
    *("input_ids", "input_features", "attention_mask", "token_type_ids", "position_ids"),
    *("decoder_input_ids", "decoder_attention_mask"),
)
"""The entries of a batch that models read; all others (labels, ids of documents) are for losses and data."""


def model_inputs(batch: Batch) -> Batch:
    """Select the entries of a batch that a model reads; every forward pass on data goes through this."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    if "position_ids" in inputs or UNPADDED in batch:
        # Packed: transformers tells documents apart by positions that start anew, and only where there is no mask.
        inputs.pop("attention_mask", None)
    return inputs


def with_decoder_inputs(model: Any, batch: Batch) -> Batch:
    """Add what the decoder of an encoder-decoder reads for the target text in `labels` [B, T], where it is not given.

    The model's own rule shifts the labels to the right. Other models, and heads of classes, which feed their decoder
    by themselves, get the batch as it is.

    Raises:
        InputError: The model has no such rule.
    """
    two_stacks = getattr(model.config, "is_encoder_decoder", False)
    if "decoder_input_ids" in batch or "labels" not in batch or not two_stacks or model.get_output_embeddings() is None:
        return batch
    labels = batch["labels"]
    if getattr(model.config, "decoder_start_token_id", None) is None:
        raise InputError(f"the config.json of this {model.config.model_type} lacks decoder_start_token_id")
    after_last = (labels != UNLABELLED).flip(-1).cumsum(-1).flip(-1) == 0  # a gap in the labels is no padding
    shifted = _shift_right(model, labels)
    return {**batch, "decoder_input_ids": shifted, "decoder_attention_mask": (~after_last).to(labels.dtype)}


def _shift_right(model: Any, labels: Tensor) -> Tensor:
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return cast("Tensor", model.prepare_decoder_input_ids_from_labels(labels=labels))
    for owner in type(model).__mro__:
        if shift := getattr(getmodule(owner), "shift_tokens_right", None):
            padding, start = model.config.pad_token_id, model.config.decoder_start_token_id
            return cast("Tensor", shift(labels, padding, start))
    raise InputError(f"a {type(model).__name__} does not say what its decoder reads; give decoder_input_ids")


def without_cache(model: Any) -> dict[str, Any]:
    """Options of a call that turn off the key-value cache, which is for generation; none for models without one."""
    kind: Any = type(model)
    return {"use_cache": False} if _takes(kind, "use_cache") else {}


def takes_token_types(model: Any) -> bool:
    """Tell whether a model tells the texts of a pair apart by their token types."""
    kind: Any = type(model)
    return _takes(kind, "token_type_ids") and (getattr(model.config, "type_vocab_size", 2) or 0) > 1


@cache  # asked at every forward pass
def _takes(kind: Any, name: str) -> bool:
    return name in signature(kind.forward).parameters


def row_count(batch: Batch) -> int:
    """Number of examples in a batch."""
    return len(batch["texts"] if "texts" in batch else next(iter(batch.values())))


def device_of(batch: Batch) -> torch.device:
    """The device that a batch is on."""
    return next(iter(batch.values())).device


def token_count(batch: Batch) -> int:
    """Number of real tokens in a batch: of the source where there are two texts, of the target where it is sound."""
    return int(batch["attention_mask"].sum() if "input_ids" in batch else (batch["labels"] != UNLABELLED).sum())


@dataclass(frozen=True)
class Capture:
    """The tensors of a forward pass that a caller asks for."""

    hidden: Sequence[int] = ()
    """Layers whose output is captured, of the decoder where there are two stacks; -1: the input of the first one."""
    attention: Sequence[int] = ()
    """Layers whose attention probabilities are captured."""
    relations: Sequence[int] = ()
    """Layers whose queries, keys and values are captured."""
    encoder_hidden: Sequence[int] = ()
    """As `hidden`, of the encoder of an encoder-decoder."""
    stop_at_head: bool = False
    """Give `last` and `head` instead of logits, where the form of the model's head is known."""


@dataclass(frozen=True)
class Outputs:
    """Results of one forward pass: logits, or the input of the head and the head."""

    logits: Tensor | None
    """[B, V] (sequence heads), [B, L, V] (token heads), [B, 2, L] (start and end of an answer), [B, D] (the vector of
    each text); None where `last` and `head` stand for them."""
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """Layer index -> that layer's own output [B, L, D], before any final norm; -1 -> the first layer's input."""
    last: Tensor | None = None
    """[B, L, D] input of the output head."""
    head: OutputHead | MixtureHead | None = None
    attention: dict[int, Tensor] = field(default_factory=dict)
    """Layer index -> attention probabilities [B, H, L, L]."""
    relations: dict[int, list[Tensor]] = field(default_factory=dict)
    """Layer index -> queries, keys and values, [B, L, D'] each."""
    encoder_hidden: dict[int, Tensor] = field(default_factory=dict)
    """The layers' outputs of the encoder, as `hidden` are those of the decoder."""


def forward(model: Any, batch: Batch, wanted: Capture) -> Outputs:
    """Run one forward pass of a transformers model; raises InputError when it has no head that gives logits."""
    head = output_head(model) if wanted.stop_at_head else None
    # With a cache transformers would not look for packed documents either.
    inputs = {**model_inputs(with_decoder_inputs(model, batch)), **without_cache(model)}
    if "token_type_ids" in inputs and not takes_token_types(model):  # a tokenizer may serve several families
        del inputs["token_type_ids"]
    with capture(model, wanted) as found, padding_known(batch, inputs):
        if head is None:
            with widen_class_logits(model):
                output = model(**inputs)
            pool = getattr(model, "sentence_head", None)
            return replace(found, logits=pool(output[0], batch["attention_mask"]) if pool else _logits(output))
        with stop_at_head(model) as hidden:
            model(**inputs)
    return replace(found, last=hidden[0], head=head)


def logits_of(model: Any, batch: Batch) -> Tensor:
    """Run one forward pass for the logits alone, in fp32."""
    logits = forward(model, batch, Capture()).logits
    assert logits is not None, "nothing is stopped at the head"
    return logits.float()


def _logits(output: Any) -> Tensor:
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], 1)
    if "logits" not in output:
        raise InputError("the model gives no logits: it has no head")
    logits: Tensor = output.logits
    return logits


@torch.no_grad()
def run_base(
    model: Any, batches: Iterable[Batch], handles: Sequence[RemovableHandle], on_batch: Callable[[Batch], None]
) -> None:
    """Run a model without its head over batches, for the hooks of the caller, and remove these at the end.

    Of encoder-decoders with a head of classes it is the head that feeds the decoder, so it is run as well.

    Args:
        model: A transformers model.
        batches: On any device.
        handles: The hooks.
        on_batch: Called with each batch, on the model's device, before it is run.
    """
    try:
        for cpu_batch in batches:
            batch = to_device(cpu_batch, model.device)
            on_batch(batch)
            inputs = model_inputs(with_decoder_inputs(model, batch))
            whole = getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs
            (model if whole else model.base_model)(**inputs, **without_cache(model))
    finally:
        for handle in handles:
            handle.remove()


T = TypeVar("T")


def to_device(value: T, device: torch.device) -> T:
    """Move every tensor in a batch or in outputs to a device."""
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
    """Take the hidden states from a layer's return value, a tensor or a tuple that starts with one."""
    return output if isinstance(output, Tensor) else output[0]


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Take the hidden states from a layer's arguments, as a forward hook receives them."""
    states = args[0] if args else kwargs["hidden_states"]
    assert isinstance(states, Tensor)
    return states


@contextmanager
def capture(model: Any, wanted: Capture) -> Iterator[Outputs]:
    """Capture tensors of the layers during one forward pass.

    Hooks see the raw layer output; `output_hidden_states` would keep every layer and, in transformers 5, returns the
    last one after the final norm. The hooks are gone when the block ends, so a recomputation during backward
    (activation checkpointing) cannot fire them again.
    """
    found = Outputs(None)
    handles: list[RemovableHandle] = []
    if wanted.hidden:
        handles += _watch_states(model, "main", wanted.hidden, found.hidden)
    if wanted.encoder_hidden:
        handles += _watch_states(model, "encoder", wanted.encoder_hidden, found.encoder_hidden)
    for layer in wanted.attention:
        handles.append(watch_maps(model, layer, partial(found.attention.__setitem__, layer)))
    for layer in wanted.relations:
        handles += watch_projections(model, layer, found.relations.setdefault(layer, [torch.empty(0)] * 3).__setitem__)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _watch_states(
    model: Any, side: StackName, wanted: Sequence[int], found: dict[int, Tensor]
) -> list[RemovableHandle]:
    """Collect the outputs of one stack's layers, and for -1 the input of the first, whenever it runs."""
    layers = layers_of(model, side)

    def keep_output(index: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        found[index] = first_tensor(output)

    def keep_input(_module: nn.Module, inputs: Any, named: Any) -> None:
        found[-1] = layer_input(inputs, named)

    handles = [layers[index].register_forward_hook(partial(keep_output, index)) for index in wanted if index >= 0]
    if -1 in wanted:
        handles.append(layers[0].register_forward_pre_hook(keep_input, with_kwargs=True))
    return handles

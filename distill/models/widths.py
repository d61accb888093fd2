"""Models whose layers differ in the size of an axis, e.g. in the width of their MLPs.

`transformers` records such sizes as `config.per_layer_config`, but its models do not read them yet: built from such a
config, they refuse. Here a stock model is built with the largest size everywhere and its layers are resized before any
weight is loaded, so that everything else (sharding, dtype, tying, missing keys) is stock `from_pretrained`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers.initialization import no_init_weights

from distill.models.axes import LayerAxis, pad_units
from distill.models.family import layers_prefix, layout_of
from distill.models.layout import Axis, AxisName, StackName, stated_width
from distill.models.mlp import placed_mlps
from distill.recipe.locate import WIDTH_KEYS

TWO_STACKS: dict[AxisName, str] = {"mlp": "mlp_widths"}
"""Config key for encoder-decoders by axis, {side: [size in each layer]}: `per_layer_config` has one entry per encoder
layer and cannot tell the stacks apart. Stock loaders fail on it, because the shapes of the weights do not fit."""

SizeOf = Callable[[StackName, int, Axis], int]
"""(stack, layer, axis) -> number of units."""


def axes_of(model: Any) -> list[tuple[StackName, int, LayerAxis]]:
    """Every axis of every layer with its stack and index, in the order of the forward pass."""
    return list(placed_mlps(model))


def is_unequal(config: Any) -> bool:
    """Tell whether a config lists sizes per layer. Other uses of `per_layer_config` are the family's own."""
    attributes = config.per_layer_attributes or set()
    two_stacks = any(hasattr(config, key) for key in TWO_STACKS.values())
    return two_stacks or (bool(attributes) and attributes <= set(WIDTH_KEYS))


def set_sizes(config: Any, sizes: Iterable[tuple[Axis, int]]) -> bool:
    """Make a config plain: each key holds the largest size that it stands for; returns whether all are that large.

    From it, stock classes build every layer alike. The key is left alone where it says the size already.
    """
    sizes = list(sizes)
    if is_unequal(config):
        config.per_layer_config = None
    for key in TWO_STACKS.values():
        config.__dict__.pop(key, None)
    largest: dict[str, int] = {}
    for axis, size in sizes:
        largest[axis.config_key] = max(size, largest.get(axis.config_key, 0))
    for key, size in largest.items():
        if stated_width(config, key) != size:
            setattr(config, key, size)
    return all(size == largest[axis.config_key] for axis, size in sizes)


def resize_layers(model: Any, size_of: SizeOf) -> None:
    """Resize every axis of every layer and record the sizes in the config; weights are left to the caller.

    The config stays the object that all modules share: a copy would hide `set_attn_implementation` from the layers.
    """
    config, bound = model.config, axes_of(model)
    for side, index, axis in bound:
        axis.resize(size_of(side, index, axis.axis))
    if set_sizes(config, [(axis.axis, axis.units) for _, _, axis in bound]):
        return
    sides = layout_of(model).sides
    if len(sides) == 1:
        by_layer: dict[int, dict[str, int]] = {}
        for _, index, axis in bound:
            by_layer.setdefault(index, {})[axis.axis.config_key] = axis.units
        config.per_layer_config = by_layer
        return
    for name, key in TWO_STACKS.items():
        own = [(side, axis.units) for side, _, axis in bound if axis.axis.name == name]
        setattr(config, key, {side: [units for stack, units in own if stack == side] for side in sides})


def with_widths(model_class: type[Any]) -> type[Any]:
    """Derive a class that builds a model from a config with sizes per layer, as the stock class does from a plain one.

    It has the stock class's name and module, which transformers reads; `as_stock` turns its models into stock ones.
    """

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        layers = list(config.per_layer_config)
        stacks = {name: getattr(config, key, None) for name, key in TWO_STACKS.items()}

        def size_of(side: StackName, index: int, axis: Axis) -> int:
            by_side = stacks[axis.name]
            return by_side[side][index] if by_side else stated_width(layers[index], axis.config_key)

        set_sizes(config, [])
        model_class.__init__(self, config, *args, **kwargs)
        resize_layers(self, size_of)

    return type(model_class.__name__, (model_class,), {"__init__": init, "__module__": model_class.__module__})


def as_stock(model: Any) -> Any:
    """Turn a built model of a class from `with_widths` into one of the stock class."""
    model.__class__ = type(model).__mro__[1]
    return model


def empty_like(model: Any, config: Any) -> Any:
    """Build a model of the same class and dtype from another config, with weights that the caller has to fill."""
    with no_init_weights():  # random ones would be drawn for nothing
        made = type(model)._from_config(config, dtype=model.dtype)
    made.tie_weights()  # part of the skipped initialisation
    inherit(made, model)
    return made


def inherit(model: Any, source: Any) -> None:
    """Give a model what its source has beside config and weights: settings of generation, and the sentence head."""
    if source.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)
    if hasattr(source, "sentence_head"):
        model.sentence_head = source.sentence_head


@torch.no_grad()
def pad_to_largest(model: Any) -> Any:
    """Copy a model into one with a plain config and the same logits: zero units fill every axis up to the largest.

    A neuron without outgoing weights adds nothing, whatever its activation.
    """
    config = copy.deepcopy(model.config)
    set_sizes(config, [])
    wide = empty_like(model, config)
    source, prefixes = model.state_dict(), {side: layers_prefix(model, side) for side in layout_of(model).sides}
    for side, index, axis in axes_of(wide):
        for name in axis.tensors:
            key = f"{prefixes[side]}.{index}.{name}"
            source[key] = pad_units(source[key], axis.axis.tensors[name], axis.units)
    for name, tensor in wide.state_dict().items():
        tensor.copy_(source[name])
    return wide.eval()

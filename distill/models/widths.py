"""Models whose layers have MLPs of different widths.

`transformers` records such widths as `config.per_layer_config`, but its models do not read them yet: built from such a
config, they refuse. Here a stock model is built with its widest MLP everywhere and its layers are narrowed before any
weight is loaded, so that everything else (sharding, dtype, tying, missing keys) is stock `from_pretrained`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from distill.models.family import layout_of
from distill.models.layout import StackName, stated_width
from distill.models.mlp import Mlp, mlps_of
from distill.recipe.locate import WIDTH_KEYS

TWO_STACKS = "mlp_widths"
"""Config key for encoder-decoders, {side: [width of each layer]}: `per_layer_config` has one entry per encoder layer
and cannot tell the stacks apart. Stock loaders fail on it, because the shapes of the weights do not fit."""


def is_unequal(config: Any) -> bool:
    """Whether a config lists MLP widths per layer. Other uses of `per_layer_config` are the family's own."""
    attributes = config.per_layer_attributes or set()
    return hasattr(config, TWO_STACKS) or (bool(attributes) and attributes <= set(WIDTH_KEYS))


def all_mlps(model: Any) -> list[Mlp]:
    """The MLPs of every stack."""
    return [mlp for side in layout_of(model).sides for mlp in mlps_of(model, side)]


def widest(mlps: Iterable[Mlp], widths: Iterable[int]) -> dict[str, int]:
    """Config key -> the largest width that it has to stand for."""
    largest: dict[str, int] = {}
    for mlp, width in zip(mlps, widths, strict=True):
        largest[mlp.layout.width_key] = max(width, largest.get(mlp.layout.width_key, 0))
    return largest


def forget_widths(config: Any) -> None:
    """Make a config plain: from it, stock classes build every layer with the width of the config key."""
    if is_unequal(config):
        config.per_layer_config = None
    config.__dict__.pop(TWO_STACKS, None)


def narrow(model: Any, widths: dict[StackName, Sequence[int]]) -> None:
    """Give each MLP its own width and record the widths in the config; weights are left to the caller.

    The config stays the object that all modules share: a copy would hide `set_attn_implementation` from the layers.
    """
    for side, own in widths.items():
        for mlp, width in zip(mlps_of(model, side), own, strict=True):
            mlp.resize(width)
    config, every = model.config, all_mlps(model)
    forget_widths(config)
    largest = widest(every, [mlp.width for mlp in every])
    for key, width in largest.items():
        if stated_width(config, key) != width:
            setattr(config, key, width)
    if all(mlp.width == largest[mlp.layout.width_key] for mlp in every):
        return
    sides = layout_of(model).sides
    if len(sides) == 1:
        config.per_layer_config = {index: {mlp.layout.width_key: mlp.width} for index, mlp in enumerate(every)}
    else:
        setattr(config, TWO_STACKS, {side: [mlp.width for mlp in mlps_of(model, side)] for side in sides})


def with_widths(model_class: type[Any]) -> type[Any]:
    """A class that builds from a config with widths per layer what the stock class builds from a plain one.

    It has the stock class's name and module, which transformers reads; `stock` turns its models into stock ones.
    """

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        layers, stacks = list(config.per_layer_config), getattr(config, TWO_STACKS, None)
        forget_widths(config)
        model_class.__init__(self, config, *args, **kwargs)
        keys = [mlp.layout.width_key for mlp in mlps_of(self)]
        narrow(self, stacks or {"main": [stated_width(*pair) for pair in zip(layers, keys, strict=True)]})

    return type(model_class.__name__, (model_class,), {"__init__": init, "__module__": model_class.__module__})


def stock(model: Any) -> Any:
    """A model of a class from `with_widths` as one of the stock class: nothing more is needed once it is built."""
    model.__class__ = type(model).__mro__[1]
    return model


@torch.no_grad()
def padded(model: Any) -> Any:
    """A copy with a plain config that gives the same logits: zero neurons fill every MLP up to the widest.

    A neuron without outgoing weights adds nothing, whatever its activation.
    """
    config, mlps = copy.deepcopy(model.config), all_mlps(model)
    forget_widths(config)
    with no_init_weights():  # every tensor is copied below
        wide = type(model)._from_config(config, dtype=model.dtype)
    wide.tie_weights()
    source = model.state_dict()
    for mlp, old in zip(all_mlps(wide), mlps, strict=True):
        inside, beside = dict(mlp.layer.named_parameters()), dict(old.layer.named_parameters())
        for name, (axis, parts) in mlp.layout.axes().items():
            if name in inside:
                _fill(inside[name], beside[name], axis, parts)
    for name, tensor in wide.state_dict().items():
        if tensor.shape == source[name].shape:
            tensor.copy_(source[name])
    if model.can_generate():
        wide.generation_config = copy.deepcopy(model.generation_config)
    return wide.eval()


def _fill(wide: Tensor, narrow_: Tensor, axis: int, parts: int) -> None:
    """Copy neurons to the front of each part, zeros behind them."""
    wide.zero_()
    for target, source in zip(wide.chunk(parts, axis), narrow_.chunk(parts, axis), strict=True):
        target.narrow(axis, 0, source.shape[axis]).copy_(source)

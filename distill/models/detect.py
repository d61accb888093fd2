"""The layout of a family that has no row: found by its structure, and trusted only after it was tried.

One stack of layers whose MLP is made of `nn.Linear` modules can be found; anything else needs a row of `LAYOUTS`. Three
trials must pass. Neurons permuted consistently leave a layer's output as it is, while permuting one side changes it. A
model built with half the width differs in the MLP's tensors alone. One built without the first layer has the other
layers as they are, down to their settings. Built are one small layer and shapes without storage: the model itself is
not run, and may be without storage, too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.initialization import no_init_weights

from distill.models.axes import keep_units
from distill.models.layout import MlpLayout, ModelLayout, Stack, stated_width
from distill.models.pattern import cut_lists
from distill.recipe.locate import LAYER_KEYS, WIDTH_KEYS

TRIAL_VOCABULARY, TRIAL_LENGTH = 64, 8
FAILURES = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)
"""Errors that building or calling a model of unknown structure may raise."""


class Unrecognised(ValueError):
    """The structure is not that of a known layout; the message says where."""


def detect(model: Any) -> ModelLayout:
    """Find the layout of a model. Raises Unrecognised."""
    base, config = model.base_model, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise Unrecognised("it is an encoder-decoder")
    depth = getattr(config, "num_hidden_layers", None)
    lists = [(name, own) for name, own in base.named_modules() if isinstance(own, nn.ModuleList) and len(own) == depth]
    if len(lists) != 1:
        raise Unrecognised(f"{len(lists)} of its module lists have num_hidden_layers ({depth}) entries")
    path, layers = lists[0]
    depth_key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if depth_key not in LAYER_KEYS:
        raise Unrecognised(f"its depth has the unknown config key {depth_key}")
    _try_depth(base, path, depth_key)
    candidates = list(_candidates(layers[0], config))
    with torch.device("cpu"):  # a model that is just being loaded is built on another
        free = [mlp for mlp in candidates if _is_permutable(base, path, depth_key, mlp)]
    found = [mlp for mlp in free if _sets_the_width(base, path, mlp)]
    if len(found) != 1:
        raise Unrecognised(
            f"of {len(candidates)} groups of linear modules in a {type(layers[0]).__name__} that could be an MLP of a "
            f"width in the config, {len(free)} compute like one, and the config key sets the shapes of {len(found)}"
        )
    return ModelLayout(Stack(path, (found[0],), depth_key))


def _candidates(layer: nn.Module, config: Any) -> Iterator[MlpLayout]:
    linears = {name: tuple(own.weight.shape) for name, own in layer.named_modules() if isinstance(own, nn.Linear)}
    for key in [key for key in WIDTH_KEYS if hasattr(config, key)]:
        width = stated_width(config, key)
        for out in [name for name, shape in linears.items() if shape == (config.hidden_size, width)]:
            beside = [name for name in linears if name.rpartition(".")[0] == out.rpartition(".")[0]]
            for fused, most in ((1, 2), (2, 1)):
                fit = [name for name in linears if linears[name] == (fused * width, config.hidden_size) and name != out]
                ins = [name for name in fit if name in beside] or fit
                if 1 <= len(ins) <= most:
                    yield MlpLayout(tuple(ins), out, key, fused)


def _try_depth(base: Any, path: str, depth_key: str) -> None:
    layers = list(base.get_submodule(path))
    shorter = _build(base, "meta", {depth_key: len(layers) - 1}, range(1, len(layers))).get_submodule(path)
    if [_shapes_and_settings(layer) for layer in shorter] != [_shapes_and_settings(layer) for layer in layers[1:]]:
        raise Unrecognised("without its first layer, the other layers are built differently")


def _shapes_and_settings(layer: nn.Module) -> dict[str, Any]:
    """Collect shapes and plain settings of everything inside a layer, except its index."""
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.named_parameters()}
    settings = {
        f"{name}:{key}": value
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and key not in ("layer_idx", "training", "_is_hf_initialized")
    }
    return {**shapes, **settings}


def _sets_the_width(base: Any, path: str, mlp: MlpLayout) -> bool:
    """Test that the config key decides the shapes of the MLP's tensors, and of nothing else in a layer."""
    halved = {mlp.width_key: stated_width(base.config, mlp.width_key) // 2}
    halves = _build(base, "meta", halved).get_submodule(path)
    for layer, half in zip(base.get_submodule(path), halves, strict=True):
        before, after = dict(layer.named_parameters()), dict(half.named_parameters())
        changed = {name for name in before if before[name].shape != after[name].shape}
        if changed != set(mlp.axis.tensors) & set(before):
            return False
        if after[f"{mlp.out}.weight"].shape[1] != halved[mlp.width_key]:
            return False
    return True


@torch.no_grad()
def _is_permutable(base: Any, path: str, depth_key: str, mlp: MlpLayout) -> bool:
    """Test that only the order of neurons is free, in a model of one random layer; needs `cpu` as default device."""
    small = _build(base, "cpu", {depth_key: 1, "vocab_size": TRIAL_VOCABULARY, "pad_token_id": 0}, [0]).eval()
    draw = torch.Generator().manual_seed(0)
    for parameter in small.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw) + (parameter.ndim == 1))
    order = torch.randperm(stated_width(base.config, mlp.width_key), generator=draw)
    inside = dict(small.get_submodule(path)[0].named_parameters())

    def output_with(*mixed: str) -> Tensor:
        places = {name: mlp.axis.tensors[name] for name in mixed if name in inside}
        changed = {f"{path}.0.{name}": keep_units(inside[name], place, order) for name, place in places.items()}
        try:
            output: Tensor = functional_call(small, changed, (), {"input_ids": torch.arange(TRIAL_LENGTH)[None]})[0]
        except FAILURES as error:
            raise Unrecognised(f"one layer of it cannot be run on token ids ({error})") from error
        return output

    plain, together, alone = output_with(), output_with(*mlp.axis.tensors), output_with(f"{mlp.out}.weight")
    gap = (alone - plain).abs().max()
    return bool(gap > 0 and (together - plain).abs().max() < 0.01 * gap)


def _build(base: Any, device: str, changes: dict[str, int], kept: Sequence[int] | None = None) -> Any:
    """Build a base model with a changed config and these layers (None: all), in fp32; weights are not drawn."""
    config = copy.deepcopy(base.config)
    try:
        if kept is not None:
            cut_lists(config, kept)
        for key, value in changes.items():
            setattr(config, key, value)
        with torch.device(device), no_init_weights():
            return type(base)._from_config(config, dtype=torch.float32, attn_implementation="eager")
    except FAILURES as error:
        raise Unrecognised(f"it cannot be built smaller ({error})") from error

"""The layout of a model's family, looked up or found by its structure; its layers, and those that must stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from distill.errors import InputError
from distill.models.detect import Unrecognised, detect
from distill.models.layout import INDEX_FLAGS, LAYOUTS, ModelLayout, StackName
from distill.recipe.schema import Layers

_detected: dict[tuple[str, str], ModelLayout] = {}


def layout_of(model: Any) -> ModelLayout:
    """Look up the row of a model's family, or detect its layout from its structure (once per family).

    Raises:
        InputError: Neither; it says what to add.
    """
    model_type = getattr(model.config, "model_type", None)
    if model_type in LAYOUTS:
        return LAYOUTS[model_type]
    key = (str(model_type), type(model.base_model).__name__)
    try:
        if key not in _detected:
            _detected[key] = detect(model)
        return _detected[key]
    except Unrecognised as error:
        raise InputError(
            f"model family {model_type!r} has no row in LAYOUTS and its structure is not recognised: {error}. "
            f"Add a row to LAYOUTS in distill/models/layout.py: where its layers are, which modules feed the MLP's "
            f"neurons and which one reads them (known: {', '.join(sorted(LAYOUTS))})"
        ) from error


def tells_documents_apart(config: Any) -> bool:
    """Tell whether models of a config's family attend within documents only, where positions start anew in a row."""
    return config.model_type in LAYOUTS and LAYOUTS[config.model_type].packs


def check_kept(model: Any, side: StackName, kept: Sequence[int]) -> None:
    """Raise InputError when the kept layers (ascending teacher indices) depend on a dropped one."""
    key = "student.layers.keep" if side == "main" else "student.encoder_layers.keep"
    reason = layout_of(model).stack(side).keep_first
    if reason and kept[0] != 0:
        raise InputError(f"{key}: layer 0 must be kept: {reason}")
    for flag in INDEX_FLAGS:
        if getattr(model.config, flag, False) and list(kept) != list(range(len(kept))):
            raise InputError(f"{key}: with {flag} a layer depends on its index; only the last layers can be dropped")


def protected_layers(model: Any, side: StackName, spec: Layers) -> frozenset[int]:
    """Layers that no policy may drop. Raises InputError when they are more than the student keeps."""
    depth = len(layers_of(model, side))
    first = max(spec.protect_first, int(bool(layout_of(model).stack(side).keep_first)))
    stay = {*range(min(first, depth)), *range(max(0, depth - spec.protect_last), depth)}
    keep = spec.keep if isinstance(spec.keep, int) else len(spec.keep)
    if len(stay) > keep:
        raise InputError(f"student.layers: {len(stay)} of {depth} layers are protected, and only {keep} are to be kept")
    return frozenset(stay)


def depths_of(model: Any) -> dict[StackName, int]:
    """Count the layers of each stack, in the order of the forward pass."""
    return {side: len(layers_of(model, side)) for side in layout_of(model).sides}


def layers_of(model: Any, side: StackName = "main") -> nn.ModuleList:
    """The layers of one stack, first to last."""
    layers = model.base_model.get_submodule(layout_of(model).stack(side).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def all_layers(model: Any) -> list[nn.Module]:
    """The layers of all stacks, the encoder's first."""
    return [layer for side in layout_of(model).sides for layer in layers_of(model, side)]


def use_eager_attention(model: Any) -> None:
    """Compute attention step by step in every stack of a model, the only way that keeps the probabilities.

    In some versions of transformers the stacks of T5 have configs of their own, which setting it on the model leaves.
    """
    for module in model.modules():
        if hasattr(module, "set_attn_implementation") and module.config._attn_implementation != "eager":
            module.set_attn_implementation("eager")


def layers_prefix(model: Any, side: StackName = "main") -> str:
    """Name of the layer list inside `model`, e.g. `bert.encoder.layer`."""
    layers = layers_of(model, side)
    return next(str(name) for name, module in model.named_modules() if module is layers)

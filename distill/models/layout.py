"""Where the parts of each model family live, as data: one row per `config.model_type`.

A family is added by adding a row; nothing else in the package asks for a model's type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from distill.errors import InputError


@dataclass(frozen=True)
class ModelLayout:
    """Dotted paths inside a family's modules and the config keys that describe them."""

    layers: str
    """From `model.base_model` to the `nn.ModuleList` of layers."""
    mlp_in: tuple[str, ...]
    """Inside a layer: the linear modules whose output rows are the MLP's neurons (gate and up, or one)."""
    mlp_out: str
    """Inside a layer: the linear module whose input columns are the MLP's neurons."""
    depth_key: str = "num_hidden_layers"
    """Config key of the number of layers."""
    width_key: str = "intermediate_size"
    """Config key of the MLP's width."""


_BERT = ModelLayout(layers="encoder.layer", mlp_in=("intermediate.dense",), mlp_out="output.dense")
_GLU = ModelLayout(layers="layers", mlp_in=("mlp.gate_proj", "mlp.up_proj"), mlp_out="mlp.down_proj")

LAYOUTS: dict[str, ModelLayout] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "llama": _GLU,
    "mistral": _GLU,
    "qwen2": _GLU,
    "qwen3": _GLU,
}

PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Config attributes with one entry per layer; they are cut together with the layers (ground for IndexError else)."""


def layout_of(config: Any) -> ModelLayout:
    """The layout of a config's family. Raises InputError naming what to add for an unknown one."""
    model_type = getattr(config, "model_type", None)
    if model_type not in LAYOUTS:
        raise InputError(
            f"model family {model_type!r} is not known to distill (known: {', '.join(sorted(LAYOUTS))}). "
            f"Add a row to LAYOUTS in distill/models/layout.py: where its layers are, which linear modules feed the "
            f"MLP's neurons and which one reads them."
        )
    return LAYOUTS[model_type]


def layers_of(model: Any) -> nn.ModuleList:
    """The model's layers, first to last."""
    layers = model.base_model.get_submodule(layout_of(model.config).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def layers_prefix(model: Any) -> str:
    """Name of the layer list inside `model`, e.g. `bert.encoder.layer`."""
    layers = layers_of(model)
    return next(str(name) for name, module in model.named_modules() if module is layers)


def mlp_out_of(model: Any, layer: nn.Module) -> nn.Linear:
    """The module that reads the MLP's neurons: its input is the activation [B, L, F] of every neuron."""
    module = layer.get_submodule(layout_of(model.config).mlp_out)
    assert isinstance(module, nn.Linear)
    return module


def mlp_in_of(model: Any, layer: nn.Module) -> list[nn.Linear]:
    """The modules that feed the MLP's neurons: row i of each belongs to neuron i."""
    modules = [layer.get_submodule(path) for path in layout_of(model.config).mlp_in]
    return [module for module in modules if isinstance(module, nn.Linear)]

"""The three formats of a release, and the code that a folder with different MLP widths brings along.

`uniform`   a plain config, one width for all layers of a config key: stock loaders.
`padded`    a plain config, zero neurons up to the widest layer: stock loaders, but narrow layers save nothing.
`native`    widths per layer in `config.per_layer_config` and a small modelling file: stock loaders that may run it.
"""

from __future__ import annotations

import json
import pprint
from pathlib import Path
from string import Template
from typing import Any

from distill.errors import InputError
from distill.files import write_text
from distill.models.family import layout_of
from distill.models.widths import is_unequal
from distill.recipe.schema import Format

MODELLING_FILE = "modeling_distill.py"
MODELLING = Template('''\
"""Written by distill: $names with an MLP of its own width in each layer.

transformers $version reads these widths (`per_layer_config` in config.json) but builds every layer alike. Here a
model is built with its widest MLP in every layer, and the layers are narrowed before weights are loaded.
"""

import transformers
from torch import nn

LAYERS = "$layers"
MLPS = $mlps
"""Of each kind of MLP: the config key of its width; tensor -> (axis of the neurons, how often each occurs)."""


def narrow(model, configs):
    """Keep as many neurons in each layer as its own config says; None stands for those it was built with."""
    for layer, config in zip(model.base_model.get_submodule(LAYERS), configs):
        tensors = dict(layer.named_parameters())
        key, places = next(mlp for mlp in MLPS if set(mlp[1]) & set(tensors))
        for name in set(places) & set(tensors) if getattr(config, key) else ():
            axis, parts = places[name]
            kept = tensors[name].detach().narrow(axis, 0, parts * getattr(config, key)).clone()
            owner, _, kind = name.rpartition(".")
            module = layer.get_submodule(owner)
            setattr(module, kind, nn.Parameter(kept))
            if kind == "weight":
                first, second = ("nx", "nf") if hasattr(module, "nx") else ("out_features", "in_features")
                setattr(module, first, kept.shape[0])
                setattr(module, second, kept.shape[1])
            elif hasattr(module, "intermediate_dim"):
                module.intermediate_dim = getattr(config, key)


def init(self, config, stock, arguments, settings):
    """Build as the stock class does, then narrow. The one config stays shared by all modules."""
    configs, overrides = list(config.per_layer_config), config.to_dict()["per_layer_config"]
    config.per_layer_config = None
    stock.__init__(self, config, *arguments, **settings)
    narrow(self, configs)
    config.per_layer_config = overrides
$classes''')
CLASS = Template("""

class $name(transformers.$name):
    def __init__(self, config, *arguments, **settings):
        init(self, config, transformers.$name, arguments, settings)

    @classmethod
    def is_custom_code(cls):
        return False  # transformers converts old names of weights for its own classes only
""")


def format_of(model: Any, asked: Format) -> Format:
    """Decide the format that a student gets: `uniform` whatever was asked, when a plain config describes it.

    Raises:
        InputError: The student cannot have the format that was asked.
    """
    if not is_unequal(model.config):
        return "uniform"
    if asked == "uniform":
        raise InputError(
            "release.format: the student's layers have MLPs of different widths, which `uniform` cannot hold: "
            "use `native` or `padded`, or `student.mlp.allocate: uniform`"
        )
    if asked == "native" and layout_of(model).encoder is not None:
        raise InputError(
            "release.format: `native` cannot hold different widths in an encoder-decoder, because transformers' "
            "per_layer_config does not tell its two stacks apart: use `padded`"
        )
    return asked


def write_modelling(folder: Path, model: Any, auto_class: str) -> None:
    """Add the modelling file to a saved model, and name its classes in config.json.

    `AutoModel` is named, too: servers build the bare model through it.
    """
    import transformers

    base, head = type(model.base_model).__name__, type(model).__name__
    stack = layout_of(model).main
    axes = [layout.axis for layout in stack.mlps]
    mlps = [(axis.config_key, {name: (dim, fused) for name, (dim, fused, _) in axis.tensors.items()}) for axis in axes]
    text = MODELLING.substitute(
        names=" and ".join(dict.fromkeys((base, head))),
        version=transformers.__version__,
        layers=stack.layers,
        mlps=pprint.pformat(mlps, width=100),
        classes="".join(CLASS.substitute(name=name) for name in dict.fromkeys((base, head))),
    )
    write_text(folder / MODELLING_FILE, text)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    module = Path(MODELLING_FILE).stem
    config["auto_map"] = {"AutoModel": f"{module}.{base}", auto_class: f"{module}.{head}"}
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")  # as transformers does

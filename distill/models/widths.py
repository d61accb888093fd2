"""Models whose layers have MLPs of different widths.

`transformers` records such widths as `config.per_layer_config`, but its models do not read them yet: built from such a
config, they refuse. Here a model is built with its widest MLP everywhere and its layers are then narrowed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from distill.models.layout import Side
from distill.models.mlp import Mlp, mlps_of


def widest(mlps: Sequence[Mlp], widths: Sequence[int]) -> dict[str, int]:
    """Config key -> the largest width that it has to stand for."""
    keys = [mlp.layout.width_key for mlp in mlps]
    return {key: max(width for own, width in zip(keys, widths, strict=True) if own == key) for key in keys}


def narrow(model: Any, widths: dict[Side, Sequence[int]]) -> None:
    """Give each layer's MLP its own width and record the widths in the config; weights are the caller's to fill.

    Layers of the main stack that differ from the config's width are listed in `config.per_layer_config`, as
    transformers does it.
    """
    different: dict[int, dict[str, int]] = {}
    for side, own in widths.items():
        for index, (mlp, width) in enumerate(zip(mlps_of(model, side), own, strict=True)):
            if width != mlp.width:
                different[index] = {mlp.layout.width_key: width}
            mlp.resize(width)
    if different:
        model.config = copy.deepcopy(model.config)
        model.config.per_layer_config = different

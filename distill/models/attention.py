"""Read inside of attention modules: probabilities, queries, keys and values, whenever a layer runs.

Shapes: B examples, L positions, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distill.errors import InputError
from distill.models.family import layers_of, layout_of
from distill.models.layout import AttentionLayout


def watch_maps(model: Any, layer: int, keep: Callable[[Tensor], None]) -> RemovableHandle:
    """Hand the attention probabilities [B, H, L, L] of one layer to `keep` whenever it runs.

    Raises:
        InputError: when the layer runs and its attention does not hand out probabilities.
    """

    def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
        maps = [part for part in output if isinstance(part, Tensor) and part.ndim == 4]
        kind = getattr(getattr(module, "config", None), "_attn_implementation", "eager")
        if not maps or kind != "eager":  # T5 hands out its biases in any case
            raise InputError(
                "match: attention needs an attention that hands out its probabilities: call "
                "model.set_attn_implementation('eager'). DeBERTa never does; use match: relations for it"
            )
        keep(maps[-1])

    return _attention(model, layer)[1].register_forward_hook(hook)


def watch_projections(model: Any, layer: int, keep: Callable[[int, Tensor], None]) -> list[RemovableHandle]:
    """Hand queries (0), keys (1) and values (2) of one layer, [B, L, D] each, to `keep` whenever they are made."""
    layout, module = _attention(model, layer)

    def keep_each(first: int, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        made = _split_fused(model.config, layout.fused, output) if layout.fused else [output]
        for number, projection in enumerate(made, first):
            keep(number, projection)

    names = enumerate(layout.projections)
    return [module.get_submodule(name).register_forward_hook(partial(keep_each, number)) for number, name in names]


def relation_widths(model: Any, layer: int) -> list[int]:
    """Widths of the queries, keys and values of one layer."""
    layout, module = _attention(model, layer)
    projections: list[Any] = [module.get_submodule(name) for name in layout.projections]
    # A linear layer holds [out, in], the one of GPT-2 [in, out].
    columns = [own.out_features if isinstance(own, nn.Linear) else int(own.weight.shape[-1]) for own in projections]
    if not layout.fused:
        return columns
    row = torch.empty(1, columns[0], device="meta")
    return [projection.shape[-1] for projection in _split_fused(model.config, layout.fused, row)]


def _attention(model: Any, layer: int) -> tuple[AttentionLayout, nn.Module]:
    layout = layout_of(model).main.attention
    if layout is None:
        raise InputError(
            f"the attention of {model.config.model_type!r} is not known; add a row for the family to LAYOUTS in "
            "distill/models/layout.py"
        )
    return layout, layers_of(model)[layer].get_submodule(layout.module)


def _split_fused(config: Any, fused: str, columns: Tensor) -> list[Tensor]:
    """Split the columns of one module into queries, keys and values."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if fused == "per_head":
        return [part.flatten(-2) for part in columns.view(*columns.shape[:-1], heads, -1).chunk(3, -1)]
    width = columns.shape[-1] // (heads + 2 * groups)
    return list(torch.split(columns, [heads * width, groups * width, groups * width], -1))

"""Where each family's attention is inside a layer, as data, and hooks that read it.

B examples, L positions, H heads, D width of queries, keys or values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.errors import InputError
from distill.models.family import layers_of


@dataclass(frozen=True)
class AttentionLayout:
    """Self-attention of a layer of the main stack."""

    module: str
    """Inside a layer: the module that attends."""
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Inside that module: what makes queries, keys and values; one name where one module makes all three."""
    fused: Literal["", "concatenated", "per_head"] = ""
    """How one module's columns are ordered: all queries, all keys, all values; or the three of each head in turn."""


_BERT = AttentionLayout("attention.self", ("query", "key", "value"))
_SELF = AttentionLayout("self_attn")

ATTENTIONS: dict[str, AttentionLayout] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT),
    "deberta-v2": AttentionLayout("attention.self", ("query_proj", "key_proj", "value_proj")),
    "distilbert": AttentionLayout("attention", ("q_lin", "k_lin", "v_lin")),
    "modernbert": AttentionLayout("attn", ("Wqkv",), "concatenated"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "granite"), _SELF),
    **dict.fromkeys(("smollm3", "mixtral", "qwen3_moe", "opt", "bart", "marian", "whisper"), _SELF),
    "phi3": AttentionLayout("self_attn", ("qkv_proj",), "concatenated"),
    "gpt2": AttentionLayout("attn", ("c_attn",), "concatenated"),
    "gpt_neox": AttentionLayout("attention", ("query_key_value",), "per_head"),
    "t5": AttentionLayout("layer.0.SelfAttention", ("q", "k", "v")),
}

Handle = Any
"""A hook that can be removed."""


def watch_maps(model: Any, layer: int, keep: Callable[[Tensor], None]) -> Handle:
    """Hand the attention probabilities [B, H, L, L] of one layer to `keep` whenever it runs.

    Raises:
        InputError: when the layer runs and its attention does not hand out probabilities.
    """

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        maps = [part for part in output if isinstance(part, Tensor) and part.ndim == 4]
        if not maps:
            raise InputError(
                "match: attention needs an attention that hands out its probabilities: call "
                "model.set_attn_implementation('eager'). DeBERTa never does; use match: relations for it"
            )
        keep(maps[-1])

    return _attention(model, layer)[1].register_forward_hook(hook)


def watch_projections(model: Any, layer: int, keep: Callable[[int, Tensor], None]) -> list[Handle]:
    """Hand queries (0), keys (1) and values (2) of one layer, [B, L, D] each, to `keep` whenever they are made."""
    layout, module = _attention(model, layer)

    def hook(number: int) -> Any:
        def each(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            parts = _split(model.config, layout.fused, output) if layout.fused else [output]
            for offset, part in enumerate(parts):
                keep(number + offset, part)

        return each

    names = enumerate(layout.projections)
    return [module.get_submodule(name).register_forward_hook(hook(number)) for number, name in names]


def relation_widths(model: Any, layer: int) -> list[int]:
    """Widths of the queries, keys and values of one layer."""
    layout, module = _attention(model, layer)
    made: list[Any] = [module.get_submodule(name) for name in layout.projections]
    # A linear layer holds [out, in], the one of GPT-2 [in, out].
    columns = [each.out_features if isinstance(each, nn.Linear) else int(each.weight.shape[-1]) for each in made]
    if not layout.fused:
        return columns
    return [part.shape[-1] for part in _split(model.config, layout.fused, torch.empty(1, columns[0], device="meta"))]


def _attention(model: Any, layer: int) -> tuple[AttentionLayout, nn.Module]:
    family = model.config.model_type
    if family not in ATTENTIONS:
        raise InputError(f"the attention of {family!r} is not known; add a row to ATTENTIONS in models/attention.py")
    layout = ATTENTIONS[family]
    return layout, layers_of(model)[layer].get_submodule(layout.module)


def _split(config: Any, fused: str, columns: Tensor) -> list[Tensor]:
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if fused == "per_head":
        return [part.flatten(-2) for part in columns.view(*columns.shape[:-1], heads, -1).chunk(3, -1)]
    width = columns.shape[-1] // (heads + 2 * groups)
    return list(torch.split(columns, [heads * width, groups * width, groups * width], -1))

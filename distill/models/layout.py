"""Where the parts of each model family live, as data: one row per `config.model_type`.

A family is added by adding a row; nothing else in the package asks for a model's type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distill.errors import InputError

StackName = Literal["main", "encoder"]
"""`main`: the only stack of layers, or the decoder of an encoder-decoder, whose other stack is `encoder`."""

NEURON_AXES = {"linear": (0, 1), "conv1d": (1, 0), "experts": (1, 2)}
"""Form of the weights -> axis of the neurons in the weights that feed them, and in the one that reads them."""


@dataclass(frozen=True)
class MlpLayout:
    """Where a layer keeps its MLP, and how the neurons lie in its tensors."""

    ins: tuple[str, ...]
    """Inside a layer: the modules (for experts: the parameters) that feed the neurons; gate before up."""
    out: str
    """Inside a layer: the module (for experts: the parameter) that reads the neurons."""
    width_key: str = "intermediate_size"
    """Config key of the number of neurons."""
    parts: int = 1
    """How often each neuron occurs in one of `ins`: 2 where gate and up are stacked in one weight."""
    form: Literal["linear", "conv1d", "experts"] = "linear"
    """`linear`: [out, in]; `conv1d`: GPT-2's transposed [in, out]; `experts`: one 3-D parameter for all experts."""

    def axes(self) -> dict[str, tuple[int, int]]:
        """Tensor inside a layer -> (axis along which its neurons lie, parts); the MLP's tensors with neurons only."""
        ins, out = NEURON_AXES[self.form]
        if self.form == "experts":
            return {**dict.fromkeys(self.ins, (ins, self.parts)), self.out: (out, 1)}
        weights = {f"{path}.weight": (ins, self.parts) for path in self.ins}
        biases = {f"{path}.bias": (0, self.parts) for path in self.ins}
        return {**weights, **biases, f"{self.out}.weight": (out, 1)}


@dataclass(frozen=True)
class Stack:
    """One stack of layers."""

    layers: str
    """From `model.base_model` to the `nn.ModuleList` of layers."""
    mlps: tuple[MlpLayout, ...]
    """What a layer may have; the first whose parts all exist is the one it has."""
    depth_key: str = "num_hidden_layers"
    """Config key of the number of layers."""
    first_only: tuple[str, ...] = ()
    """Tensors inside a layer that only the first layer has and uses for all; a student's first layer inherits them."""
    keep_first: str = ""
    """Why the first layer cannot be dropped; empty: it can."""
    normed_after: str = ""
    """Which norm an MLP's output passes before it leaves its layer; empty: none, it is added to the stream as it is."""
    pre_norm_key: str = ""
    """Config switch of families of both kinds: where it is off, `normed_after` holds; empty: it always does."""
    scale_key: str = ""
    """Config key of the factor that an MLP's output is multiplied with before it is added; empty: 1."""


@dataclass(frozen=True)
class ModelLayout:
    """The stacks of a family."""

    main: Stack
    encoder: Stack | None = None

    @property
    def sides(self) -> tuple[StackName, ...]:
        """The stacks in the order of the forward pass."""
        return ("encoder", "main") if self.encoder else ("main",)

    def stack(self, side: StackName) -> Stack:
        """One stack. Raises InputError when the family has no encoder of its own."""
        stack = self.main if side == "main" else self.encoder
        if stack is None:
            raise InputError("student.encoder_layers: the teacher is not an encoder-decoder; use student.layers")
        return stack


GLU = MlpLayout(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
FUSED_GLU = MlpLayout(("mlp.gate_up_proj",), "mlp.down_proj", parts=2)
BERT_MLP = MlpLayout(("intermediate.dense",), "output.dense")
EXPERTS = MlpLayout(("mlp.experts.gate_up_proj",), "mlp.experts.down_proj", parts=2, form="experts")


def _fc(width_key: str) -> MlpLayout:
    return MlpLayout(("fc1",), "fc2", width_key)


def _t5(layer: int) -> tuple[MlpLayout, ...]:
    inner = f"layer.{layer}.DenseReluDense"
    plain = MlpLayout((f"{inner}.wi",), f"{inner}.wo", "d_ff")
    return plain, MlpLayout((f"{inner}.wi_0", f"{inner}.wi_1"), f"{inner}.wo", "d_ff")


POST_NORM = "a norm follows the sum of the MLP's output and its input"
SANDWICH = "a norm follows the MLP's output"

_BERT = ModelLayout(Stack("encoder.layer", (BERT_MLP,), normed_after=POST_NORM))
_GLU = ModelLayout(Stack("layers", (GLU,)))
_SANDWICH_GLU = ModelLayout(Stack("layers", (GLU,), normed_after=SANDWICH))


def _seq2seq(normed_after: str) -> ModelLayout:
    return ModelLayout(
        main=Stack("decoder.layers", (_fc("decoder_ffn_dim"),), "decoder_layers", normed_after=normed_after),
        encoder=Stack("encoder.layers", (_fc("encoder_ffn_dim"),), "encoder_layers", normed_after=normed_after),
    )


_T5_BIAS = ("layer.0.SelfAttention.relative_attention_bias.weight",)

LAYOUTS: dict[str, ModelLayout] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "deberta-v2": _BERT,
    "distilbert": ModelLayout(
        Stack(
            "transformer.layer",
            (MlpLayout(("ffn.lin1",), "ffn.lin2", "hidden_dim"),),
            "n_layers",
            normed_after=POST_NORM,
        )
    ),
    "modernbert": ModelLayout(
        Stack(
            "layers",
            (MlpLayout(("mlp.Wi",), "mlp.Wo", parts=2),),
            keep_first="the first layer of ModernBERT has no norm before its attention, all others have one",
        )
    ),
    "llama": _GLU,
    "mistral": _GLU,
    "qwen2": _GLU,
    "qwen3": _GLU,
    "gemma2": _SANDWICH_GLU,
    "gemma3_text": _SANDWICH_GLU,
    "olmo2": _SANDWICH_GLU,
    "granite": ModelLayout(Stack("layers", (GLU,), scale_key="residual_multiplier")),
    "smollm3": _GLU,
    "phi3": ModelLayout(Stack("layers", (FUSED_GLU,))),
    "gpt2": ModelLayout(Stack("h", (MlpLayout(("mlp.c_fc",), "mlp.c_proj", "n_inner", form="conv1d"),), "n_layer")),
    "gpt_neox": ModelLayout(Stack("layers", (MlpLayout(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),))),
    "opt": ModelLayout(
        Stack("decoder.layers", (_fc("ffn_dim"),), normed_after=POST_NORM, pre_norm_key="do_layer_norm_before")
    ),
    "mixtral": ModelLayout(Stack("layers", (EXPERTS,))),
    "qwen3_moe": ModelLayout(
        Stack(
            "layers",
            (MlpLayout(EXPERTS.ins, EXPERTS.out, "moe_intermediate_size", parts=2, form="experts"), GLU),
        )
    ),
    "t5": ModelLayout(
        main=Stack("decoder.block", _t5(2), "num_decoder_layers", _T5_BIAS),
        encoder=Stack("encoder.block", _t5(1), "num_layers", _T5_BIAS),
    ),
    "bart": _seq2seq(POST_NORM),
    "marian": _seq2seq(POST_NORM),
    "whisper": _seq2seq(""),
}

PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Config attributes with one entry per layer of the main stack; they are cut together with the layers."""

INDEX_FLAGS = ("scale_attn_by_inverse_layer_idx",)
"""Config attributes that, when true, make what a layer computes depend on its index."""


def cut_lists(config: Any, kept: Sequence[int]) -> None:
    """Keep the entries of these layers in every list with one entry per layer."""
    for name in PER_LAYER_LISTS:
        values = getattr(config, name, None)
        if values is not None:
            setattr(config, name, [values[index] for index in kept])


def stated_width(config: Any, key: str) -> int:
    """What a config says about an MLP's width; null (GPT-2's n_inner) stands for four times the hidden size."""
    return int(getattr(config, key) or 4 * config.hidden_size)

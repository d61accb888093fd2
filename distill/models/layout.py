"""The layers of each model family, and the tensors of every axis in them, as data: one row per `config.model_type`.

A family is added by adding a row; nothing else in the package asks for a model's type.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from distill.errors import InputError

StackName = Literal["main", "encoder"]
"""`main`: the only stack of layers, or the decoder of an encoder-decoder, whose other stack is `encoder`."""

AxisName = Literal["mlp"]
"""The axes that layers can be cut along: `mlp`, the neurons of a layer's MLP."""


class UnitDim(NamedTuple):
    """The dimension of a tensor along which the units of an axis lie: `fused` groups in a row, each of all units."""

    dim: int
    fused: int = 1
    """Number of groups: 2 where gate and up are stacked in one weight."""
    block: int = 1
    """Consecutive entries that belong to one unit."""


@dataclass(frozen=True)
class Axis:
    """An axis of a layer: units that can be kept or removed, and every tensor that holds a part of each unit."""

    name: AxisName
    tensors: dict[str, UnitDim]
    """By name inside the layer, in the order of the forward pass; a layer may lack some (biases)."""
    config_key: str
    """Config key of the number of units."""
    per_expert: bool = False
    """Dimension 0 of every tensor counts experts, and each expert has units of its own."""


NEURON_DIMS = {"linear": (0, 1), "conv1d": (1, 0), "experts": (1, 2)}
"""Storage of the weights -> dimension of the neurons in the weights that feed them, and in the one that reads them."""


@dataclass(frozen=True)
class MlpLayout:
    """The modules or parameters of a layer's MLP."""

    ins: tuple[str, ...]
    """Inside a layer: the modules (for experts: the parameters) that feed the neurons; gate before up."""
    out: str
    """Inside a layer: the module (for experts: the parameter) that reads the neurons."""
    width_key: str = "intermediate_size"
    """Config key of the number of neurons."""
    fused: int = 1
    """Number of weights stacked in each of `ins`: 2 where gate and up are one."""
    storage: Literal["linear", "conv1d", "experts"] = "linear"
    """`linear`: [out, in]; `conv1d`: GPT-2's transposed [in, out]; `experts`: one 3-D parameter for all experts."""

    @property
    def per_expert(self) -> bool:
        """True where the MLP is a set of experts, kept in 3-D parameters."""
        return self.storage == "experts"

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weights inside a layer, `out` last."""
        return tuple(path if self.per_expert else f"{path}.weight" for path in (*self.ins, self.out))

    @property
    def axis(self) -> Axis:
        """The axis `mlp`: the neurons' rows in the weights and biases of `ins`, and their columns in `out`."""
        ins, out = NEURON_DIMS[self.storage]
        dims = dict.fromkeys(self.weights[:-1], UnitDim(ins, self.fused))
        if not self.per_expert:
            dims |= {f"{path}.bias": UnitDim(0, self.fused) for path in self.ins}
        return Axis("mlp", {**dims, self.weights[-1]: UnitDim(out)}, self.width_key, self.per_expert)


@dataclass(frozen=True)
class AttentionLayout:
    """The modules that make queries, keys and values in a layer's self-attention."""

    module: str
    """Inside a layer: the module that attends."""
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Inside that module: the modules of queries, keys and values; one name where one module makes all three."""
    fused: Literal["", "concatenated", "per_head"] = ""
    """Order of one module's columns: all queries, all keys, all values; or the three of each head in turn."""


@dataclass(frozen=True)
class Stack:
    """One stack of layers."""

    layers: str
    """From `model.base_model` to the `nn.ModuleList` of layers."""
    mlps: tuple[MlpLayout, ...]
    """The kinds of MLP that a layer may have; it has the first one whose weights all exist."""
    attention: AttentionLayout | None = None
    """None: not known, as in families that were found by their structure."""
    depth_key: str = "num_hidden_layers"
    """Config key of the number of layers."""
    first_only: tuple[str, ...] = ()
    """Tensors inside a layer that only the first layer has and uses for all; a student's first layer inherits them."""
    keep_first: str = ""
    """Reason that the first layer cannot be dropped; empty: it can."""
    normed_after: str = ""
    """The norm between the MLP's output and the residual stream (post-norm, sandwich norm); empty: there is none."""
    pre_norm_key: str = ""
    """Config switch of families of both kinds: where it is off, `normed_after` holds; empty: it always does."""
    scale_key: str = ""
    """Config key of the factor that an MLP's output is multiplied with before it is added; empty: 1."""


@dataclass(frozen=True)
class ModelLayout:
    """The stacks of a family."""

    main: Stack
    encoder: Stack | None = None
    packs: bool = False
    """Attention stays within documents that share a row, as far as their positions, which start anew, tell."""

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
FUSED_GLU = MlpLayout(("mlp.gate_up_proj",), "mlp.down_proj", fused=2)
BERT_MLP = MlpLayout(("intermediate.dense",), "output.dense")
EXPERTS = MlpLayout(("mlp.experts.gate_up_proj",), "mlp.experts.down_proj", fused=2, storage="experts")
SELF_ATTENTION = AttentionLayout("self_attn")

POST_NORM = "a norm follows the sum of the MLP's output and its input"
SANDWICH = "a norm follows the MLP's output"


def _bert(attention: AttentionLayout) -> ModelLayout:
    return ModelLayout(Stack("encoder.layer", (BERT_MLP,), attention, normed_after=POST_NORM))


def _decoder(
    *mlps: MlpLayout, attention: AttentionLayout = SELF_ATTENTION, normed_after: str = "", scale_key: str = ""
) -> ModelLayout:
    stack = Stack("layers", mlps, attention, normed_after=normed_after, scale_key=scale_key)
    return ModelLayout(stack, packs=True)


def _t5(side: str, mlp: int, depth_key: str) -> Stack:
    inner = f"layer.{mlp}.DenseReluDense"
    plain = MlpLayout((f"{inner}.wi",), f"{inner}.wo", "d_ff")
    gated = MlpLayout((f"{inner}.wi_0", f"{inner}.wi_1"), f"{inner}.wo", "d_ff")
    attention = AttentionLayout("layer.0.SelfAttention", ("q", "k", "v"))
    bias = "layer.0.SelfAttention.relative_attention_bias.weight"
    return Stack(f"{side}.block", (plain, gated), attention, depth_key, (bias,))


def _seq2seq(normed_after: str) -> ModelLayout:
    def stack(side: str) -> Stack:
        mlp = MlpLayout(("fc1",), "fc2", f"{side}_ffn_dim")
        return Stack(f"{side}.layers", (mlp,), SELF_ATTENTION, f"{side}_layers", normed_after=normed_after)

    return ModelLayout(stack("decoder"), stack("encoder"))


BERT_ATTENTION = AttentionLayout("attention.self", ("query", "key", "value"))
DEBERTA_ATTENTION = AttentionLayout("attention.self", ("query_proj", "key_proj", "value_proj"))
DISTILBERT = Stack(
    "transformer.layer",
    (MlpLayout(("ffn.lin1",), "ffn.lin2", "hidden_dim"),),
    AttentionLayout("attention", ("q_lin", "k_lin", "v_lin")),
    "n_layers",
    normed_after=POST_NORM,
)
MODERNBERT = Stack(
    "layers",
    (MlpLayout(("mlp.Wi",), "mlp.Wo", fused=2),),
    AttentionLayout("attn", ("Wqkv",), "concatenated"),
    keep_first="the first layer of ModernBERT has no norm before its attention, all others have one",
)
GPT2 = Stack(
    "h",
    (MlpLayout(("mlp.c_fc",), "mlp.c_proj", "n_inner", storage="conv1d"),),
    AttentionLayout("attn", ("c_attn",), "concatenated"),
    "n_layer",
)
GPT_NEOX = Stack(
    "layers",
    (MlpLayout(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),),
    AttentionLayout("attention", ("query_key_value",), "per_head"),
)
OPT = Stack(
    "decoder.layers",
    (MlpLayout(("fc1",), "fc2", "ffn_dim"),),
    SELF_ATTENTION,
    normed_after=POST_NORM,
    pre_norm_key="do_layer_norm_before",
)

LAYOUTS: dict[str, ModelLayout] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _bert(BERT_ATTENTION)),
    "deberta-v2": _bert(DEBERTA_ATTENTION),
    "distilbert": ModelLayout(DISTILBERT),
    "modernbert": ModelLayout(MODERNBERT),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _decoder(GLU)),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), _decoder(GLU, normed_after=SANDWICH)),
    "granite": _decoder(GLU, scale_key="residual_multiplier"),
    "smollm3": _decoder(GLU),
    "phi3": _decoder(FUSED_GLU, attention=AttentionLayout("self_attn", ("qkv_proj",), "concatenated")),
    "gpt2": ModelLayout(GPT2, packs=True),
    "gpt_neox": ModelLayout(GPT_NEOX, packs=True),
    "opt": ModelLayout(OPT),
    "mixtral": _decoder(EXPERTS),
    "qwen3_moe": _decoder(replace(EXPERTS, width_key="moe_intermediate_size"), GLU),
    **dict.fromkeys(
        ("t5", "mt5"), ModelLayout(_t5("decoder", 2, "num_decoder_layers"), _t5("encoder", 1, "num_layers"))
    ),
    **dict.fromkeys(("bart", "marian"), _seq2seq(POST_NORM)),
    **dict.fromkeys(("mbart", "pegasus", "whisper"), _seq2seq("")),
}

INDEX_FLAGS = ("scale_attn_by_inverse_layer_idx",)
"""Config attributes that, when true, make the output of a layer depend on its index."""


def stated_width(config: Any, key: str) -> int:
    """Read an MLP's width from a config; null (GPT-2's n_inner) stands for four times the hidden size."""
    return int(getattr(config, key) or 4 * config.hidden_size)

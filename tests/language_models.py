"""A tiny language model of every known family, with the head that its architecture has: causal, masked or seq2seq."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoConfig

from distill.models.layout import LAYOUTS

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
RENAMED = {
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "t5": {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 0},
    "electra": {"embedding_size": 16},
    "granite": {"logits_scaling": 3.0},
    "gemma2": {"final_logit_softcapping": 0.5},
    "gemma3_text": {"final_logit_softcapping": 0.5},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
}  # fmt: skip
RENAMED |= {"mt5": RENAMED["t5"]} | dict.fromkeys(("marian", "mbart", "pegasus"), RENAMED["bart"])
ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "deberta-v2", "distilbert", "modernbert")
SEQ2SEQ = ("t5", "mt5", "bart", "marian", "mbart", "pegasus")
FAMILIES = [family for family in LAYOUTS if family != "whisper"]


def language_model(family: str):
    torch.manual_seed(0)
    names = dict.fromkeys(ENCODERS, "AutoModelForMaskedLM") | dict.fromkeys(SEQ2SEQ, "AutoModelForSeq2SeqLM")
    extra = RENAMED.get(family, {})
    sizes = {key: value for key, value in SIZES.items() if family not in ENCODERS or "key_value" not in key}
    if family in ("gpt2", "distilbert", *SEQ2SEQ):
        sizes = {key: SIZES[key] for key in ("vocab_size", "pad_token_id", "eos_token_id")}
    config = AutoConfig.for_model(family, **{**sizes, **extra})
    model = getattr(transformers, names.get(family, "AutoModelForCausalLM")).from_config(config)
    with torch.no_grad():  # fresh biases are zero, which would hide one that is left out
        for tensor in [*model.parameters(), getattr(model, "final_logits_bias", torch.zeros(1))]:
            if tensor.ndim == 1 or tensor.shape[0] == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()

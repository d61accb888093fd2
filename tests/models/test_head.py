"""The head and the rows it reads must give the model's own logits, for every family that has such a head."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import tiny_batch
from transformers import AutoConfig

from distill.losses.chunked import Side, chunks
from distill.models.head import OutputHead, output_head, stopped_at_head
from distill.models.layout import LAYOUTS
from distill.models.outputs import Wanted, run

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
RENAMED["marian"] = RENAMED["bart"]
ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "deberta-v2", "distilbert", "modernbert")
SEQ2SEQ = ("t5", "bart", "marian")
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


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_and_head_give_the_models_own_logits(family):
    model, batch = language_model(family), tiny_batch(padded=False)
    if family in SEQ2SEQ:
        batch["decoder_input_ids"] = tiny_batch(seed=1, padded=False)["input_ids"]
    expected = model(**batch).logits
    found = run(model, batch, Wanted(stop_at_head=True))
    assert found.logits is None and found.last.shape[:2] == expected.shape[:2]
    torch.testing.assert_close(found.head(found.last), expected, rtol=1e-5, atol=1e-6)
    rows = Side(found.last.flatten(0, 1), found.head)
    for part, (logits,) in chunks([rows], 7):
        torch.testing.assert_close(logits, expected.flatten(0, 1)[part], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)  # the model is as it was


def test_a_cohere_scale_is_part_of_the_head():
    model = transformers.AutoModelForCausalLM.from_config(AutoConfig.for_model("cohere", **SIZES, logit_scale=0.25))
    assert output_head(model).scale == 0.25


def test_a_model_without_a_vocabulary_keeps_its_logits():
    config = AutoConfig.for_model("bert", **{key: value for key, value in SIZES.items() if "key" not in key})
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    assert run(model, tiny_batch(), Wanted(stop_at_head=True)).logits.shape == (3, 2)


def test_a_forward_pass_that_fails_leaves_the_head_in_place():
    model = language_model("llama")
    with pytest.raises(RuntimeError), stopped_at_head(model):
        raise RuntimeError
    assert "forward" not in model.lm_head.__dict__


@torch.no_grad()
def test_a_half_precision_head_gives_fp32_logits_of_its_own_numbers():
    draw = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(shape, generator=draw).bfloat16() for shape in [(50, 16), (9, 16)])
    before = torch.backends.mkldnn.matmul.fp32_precision
    ((_, (logits,)),) = chunks([Side(rows, OutputHead(weight, bias=torch.ones(50, dtype=torch.bfloat16), scale=2.0))])
    assert logits.dtype == torch.float32 and torch.backends.mkldnn.matmul.fp32_precision == before
    torch.testing.assert_close(logits.double(), 2 * rows.double() @ weight.double().T + 1, rtol=1e-6, atol=1e-5)

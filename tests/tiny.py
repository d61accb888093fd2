"""Tiny real models of every known family, built from configs; no network, no downloads."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoConfig

VOCABULARY, HIDDEN, WIDTH, LAYERS = 64, 32, 48, 4

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
DECODERS = ("llama", "mistral", "qwen2", "qwen3")
ENCODERS = ("bert", "roberta", "xlm-roberta", "electra")


def tiny_config(family: str, **changes):
    extra = {}
    if family in DECODERS:
        extra = {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family in ("roberta", "xlm-roberta"):
        extra = {"pad_token_id": 1}
    if family == "qwen3":
        extra["head_dim"] = 8
    return AutoConfig.for_model(family, **{**SIZES, **extra, **changes})


def tiny_model(family: str, seed: int = 0, **changes):
    """A decoder with a language-model head or an encoder with a 3-class head; random weights, biases included."""
    torch.manual_seed(seed)
    auto = "AutoModelForCausalLM" if family in DECODERS else "AutoModelForSequenceClassification"
    if family in ENCODERS:
        changes.setdefault("num_labels", 3)
    model = getattr(transformers, auto).from_config(tiny_config(family, **changes))
    with torch.no_grad():  # fresh biases are zero and norms are one, which would hide a wrong slice
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_batch(seed: int = 0, rows: int = 3, length: int = 10, *, padded: bool = True):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(1, rows):
            mask[row, length - row :] = 0
        ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask}

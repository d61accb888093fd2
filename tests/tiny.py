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


WORDS = ("red", "green", "blue", "cat", "dog", "fish", "runs", "sleeps", "eats", "fast", "slow", "here", "there")
CLASSES = {"cat": "mammal", "dog": "mammal", "fish": "swimmer"}

RECIPE = """\
name: tiny
seed: 3
teacher:
  model: ./teacher
  init: random
  fit: {steps: 12, batch_size: 8, micro_batch_size: 4, lr: 3e-3, save_every: 4}
student:
  layers: {keep: 2, choose: every}
  mlp: {keep: 0.5, multiple_of: 8}
  calibration: {examples: 16, batch_size: 8}
data: {source: ./data.jsonl, task: classification, labelled: 24, max_length: 16}
losses:
  - {match: labels, weight: 0.3}
  - {match: logits, temperature: 2.0}
  - {match: hidden}
training: {steps: 12, batch_size: 8, micro_batch_size: 4, lr: 1e-3, save_every: 4, evaluate_every: 6, log_every: 2}
evaluation: {batch_size: 16}
release: {license: apache-2.0}
"""


def tiny_project(folder, recipe: str = RECIPE, family: str = "bert"):
    """A recipe with its own teacher folder (config and tokenizer) and data file; returns the recipe's path."""
    import json
    import random

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*specials, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "eos_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **names)
    tokenizer.save_pretrained(folder / "teacher")
    tiny_config(family, pad_token_id=0).save_pretrained(folder / "teacher")
    chooser = random.Random(0)
    texts = {" ".join(chooser.choices(WORDS, k=chooser.randint(3, 14))) for _ in range(150)}
    rows = [(text, next((CLASSES[w] for w in text.split() if w in CLASSES), "none")) for text in sorted(texts)]
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
    (folder / "data.jsonl").write_text("".join(lines))
    (folder / "recipe.yaml").write_text(recipe)
    return folder / "recipe.yaml"

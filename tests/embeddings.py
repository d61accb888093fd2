"""A small project of the task `embedding`: pairs of a text and its translation, and a teacher that can learn them."""

from __future__ import annotations

import json
import random

import torch
from tiny import tiny_config
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModel, PreTrainedTokenizerFast

from distill.models.sentence import SentenceHead

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
MEANINGS = {f"{letter}{number}": f"{letter.upper()}{number}" for letter in "abcde" for number in range(6)}
"""Words of one language, and what they are called in another."""
WORDS = [*MEANINGS, *MEANINGS.values()]
PROMPTS = {"query": "a0 b0 ", "document": "C0 "}
RECIPE = """\
name: vectors
teacher: {model: ./teacher}
student: {layers: {keep: 1}, mlp: {keep: 0.5, multiple_of: 8}}
data: {source: ./pairs.jsonl, task: embedding, columns: {text: query, pair: answer}, max_length: 16}
losses:
  - {match: output, loss: cosine}
  - {match: logits, temperature: 0.1, scale_by_temperature: false, weight: 0.1}
training: {steps: 100, batch_size: 32, micro_batch_size: 16, lr: 5e-3, log_every: 60}
evaluation: {batch_size: 16, efficiency: false}
release: {license: apache-2.0}
"""
FIT = ("teacher.init=random", "teacher.fit={steps: 100, batch_size: 32, lr: 5e-3}")


def word_tokenizer(words=WORDS, splits=" "):
    found = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIALS, *words])}, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Split(Regex(splits), "removed" if splits == " " else "isolated")
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=found, model_max_length=64, **names)


def project(folder, recipe=RECIPE, head=None):
    """A recipe beside its teacher and pairs of a text and its translation, in another order."""
    config = tiny_config("bert", vocab_size=len(SPECIALS) + len(WORDS), pad_token_id=0, initializer_range=0.1)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder / "teacher")
    word_tokenizer().save_pretrained(folder / "teacher")
    for name, text in ((head or SentenceHead(normalize=True)).files(config.hidden_size)).items():
        (folder / "teacher" / name).parent.mkdir(exist_ok=True)
        (folder / "teacher" / name).write_text(text)
    chooser = random.Random(0)
    texts = [chooser.sample(list(MEANINGS), chooser.randint(3, 6)) for _ in range(600)]
    rows = [
        {"query": " ".join(text), "answer": " ".join(MEANINGS[word] for word in chooser.sample(text, len(text)))}
        for text in texts
    ]
    lines = [json.dumps({**row, "grade": len(row["answer"]) / 10}) + "\n" for row in rows]
    (folder / "pairs.jsonl").write_text("".join(lines))
    (folder / "recipe.yaml").write_text(recipe)
    return folder / "recipe.yaml"

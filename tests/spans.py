"""Small texts about things of three kinds, and models that learn within seconds which of them is asked for."""

from __future__ import annotations

import json
import random
from itertools import chain

from tiny import tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

THINGS = {
    "colour": ["red", "green", "blue", "pink", "grey", "brown"],
    "animal": ["cat", "dog", "fish", "bird", "horse", "frog"],
    "city": ["rome", "oslo", "lima", "cairo", "delhi", "paris"],
}
FILL = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
RECIPE = """\
name: tiny-spans
seed: 3
teacher:
  model: ./teacher
  init: random
  fit: {steps: 150, batch_size: 32, lr: 1e-3, schedule: cosine, warmup: 0.1}
student:
  layers: {keep: 2, choose: even}
  mlp: {keep: 0.5, multiple_of: 8}
  calibration: {examples: 32, batch_size: 16}
data: {source: ./data.jsonl, task: question_answering, max_length: 20}
losses: [{match: logits}, {match: hidden}]
training: {steps: 100, batch_size: 16, lr: 2e-3}
evaluation: {batch_size: 32, efficiency: false, arms: [teacher, cut, distilled]}
release: {license: apache-2.0}
"""


def make_tokenizer(words, split=None):
    """A tokenizer of these words, one token each, with [CLS] and [SEP] around one text or two."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    backend = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = split or pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **special)


def characters(text):
    """A tokenizer whose tokens are the characters of a text, as those of Chinese models are."""
    return make_tokenizer(sorted({*text} - {" "}), pre_tokenizers.Split("", "isolated"))


def words():
    return make_tokenizer(["which", *THINGS, *FILL, *chain(*THINGS.values())])


def spans_project(folder, rows, recipe=RECIPE):
    """A recipe beside its data and its teacher, a config and a tokenizer; returns the recipe's path."""
    tokenizer = words()
    tokenizer.save_pretrained(folder / "teacher")
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96}
    sizes |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    tiny_config("bert", pad_token_id=0, initializer_range=0.1, **sizes).save_pretrained(folder / "teacher")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(recipe)
    return folder / "recipe.yaml"


def fillers(chooser):
    """A few words that say nothing, now and then more than a window takes."""
    return chooser.choices(FILL, k=chooser.randint(1, 5) if chooser.random() < 0.85 else chooser.randint(14, 22))


def place_of(word, text):
    return f" {text} ".index(f" {word} ")


def question_rows(count, seed=0):
    """Questions after a kind of thing; one in four has no answer, one in seven contexts is longer than a window."""
    chooser, rows = random.Random(seed), []
    for _ in range(count):
        words, told = fillers(chooser), {kind: chooser.choice(own) for kind, own in THINGS.items()}
        told = {kind: thing for kind, thing in told.items() if chooser.random() < 0.75}
        for thing in told.values():
            words.insert(chooser.randint(0, len(words)), thing)
        asked, context = chooser.choice(list(THINGS)), " ".join(words)
        texts = [told[asked]] if asked in told else []
        answers = {"text": texts, "answer_start": [place_of(text, context) for text in texts]}
        rows.append({"question": f"which {asked}", "context": context, "answers": answers})
    return rows


def relation_rows(count, seed=0):
    """Two things; what the tail is decides on the relation, on whichever side of the head it stands."""
    chooser, rows = random.Random(seed), []
    named = {"animal": "eats", "city": "lives_in", "colour": "none"}
    for _ in range(count):
        words, kinds = fillers(chooser), chooser.choices(list(THINGS), k=2)
        head, tail = (chooser.choice(THINGS[kind]) for kind in kinds)
        if head == tail:
            continue
        for thing in (head, tail):
            words.insert(chooser.randint(0, len(words)), thing)
        text = " ".join(words)
        spans = {side: [place_of(w, text), place_of(w, text) + len(w)] for side, w in (("head", head), ("tail", tail))}
        rows.append({"text": text, **spans, "relation": named[kinds[1]]})
    return rows

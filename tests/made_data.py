"""Stand-ins for the data that scripts make for recipes, which the repository does not hold."""

from __future__ import annotations

import json
import random
import shutil

VOWELS = dict(zip("aeiou", ("AE1", "EH0", "IH0", "OW2", "UW1"), strict=True))
SOUNDS = VOWELS | {letter: letter.upper() for letter in "bdfgklmnprst"}


def spelled_words(count, seed):
    """Words whose every letter is one phoneme."""
    chooser = random.Random(seed)
    words = sorted({"".join(chooser.choices(sorted(SOUNDS), k=chooser.randint(2, 6))) for _ in range(count)})
    return [{"source": " ".join(word), "target": " ".join(map(SOUNDS.get, word))} for word in words]


def questions(count, seed):
    """Questions about words, which are answered by spelling them."""
    return [
        {"prompt": f"How is {word} spelled?", "completion": row["source"]}
        for row in spelled_words(count, seed)
        for word in [row["source"].replace(" ", "")]
    ]


MADE = {
    "cmudict-seq2seq": {"train": (spelled_words, 400), "test": (spelled_words, 60)},
    "smollm2-chat": {"train": (questions, 60), "test": (questions, 20), "topics": (questions, 10)},
}
"""Recipe -> file of its folder `data` -> rows and how many."""


def with_data(recipe, folder):
    """A recipe that can be run: itself, or a copy in a folder with stand-ins for its data."""
    made = MADE.get(recipe.parent.name)
    if made is None:
        return recipe
    copy = folder / recipe.parent.name
    if not copy.exists():
        shutil.copytree(recipe.parent, copy, ignore=shutil.ignore_patterns("data"))
        (copy / "data").mkdir()
        for seed, (name, (rows, count)) in enumerate(made.items()):
            lines = [json.dumps(row) + "\n" for row in rows(count, seed)]
            (copy / "data" / f"{name}.jsonl").write_text("".join(lines))
    return copy / recipe.name

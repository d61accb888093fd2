"""One vector for each text, alike for texts that belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch

from distill.data.tasks.prompts import note_prompt
from distill.data.tasks.task import TEXT, Column, Encoder, Features, Seeds, Task, Values
from distill.errors import InputError
from distill.models.forward import UNLABELLED, Batch
from distill.models.sentence import SentenceHead


def read_score(value: Any) -> float:
    """Accept a number, also written as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("is no number")
    score = float(value)
    if not np.isfinite(score):
        raise ValueError("is no finite number")
    return score


class Embedding(Task):
    """Texts; with a `pair` each, the text that belongs to it; with a `score`, a text that is so similar.

    Both texts of a row are one example, so that they meet in one micro-batch. As features their token ids stand one
    after the other, in a batch they are rows of their own.
    """

    name = "embedding"
    auto_class = "AutoModel"
    head = "embedding"
    columns: ClassVar = {"text": TEXT, "pair": TEXT, "score": Column(read_score)}

    def encode(self, rows: Values, encoder: Encoder) -> Features:
        """Encode each text, and its pair, behind the prompts of the teacher or the recipe."""
        head, spec = encoder.sentence, encoder.spec
        retrieval = spec.learns_from_pairs
        if head.max_length is not None and spec.max_length > head.max_length:
            raise InputError(
                f"data.max_length: {spec.max_length} tokens, and the teacher's sentence-transformers settings cut "
                f"texts to {head.max_length}"
            )
        head = head.with_prompts(spec.prompts, retrieval)
        given = [side for side in ("text", "pair") if side in rows]
        sides = [_encode(rows[side], head.prompt(side, retrieval), head, encoder) for side in given]
        features: Features = {
            "input_ids": [list(chain(*texts)) for texts in zip(*sides, strict=True)],
            "first": [len(ids) for ids in sides[0]],
            "labelled": [retrieval] * len(sides[0]),
        }
        return features | ({"score": list(rows["score"])} if "score" in rows else {})

    def collate(self, examples: Mapping[str, Any], padding: int, seeds: Seeds) -> Batch:
        """Make rows of the texts, those of one example one after the other, and label them with its number."""
        ids, first = examples["input_ids"], examples["first"]
        rest = ids.lengths - first
        count = 2 if rest.any() else 1
        lengths = np.stack([first, rest], 1)[:, :count].ravel()
        numbers = np.arange(len(first)) if examples["labelled"].any() else np.full(len(first), UNLABELLED)
        batch = super().collate({"input_ids": replace(ids, lengths=lengths)}, padding, seeds)
        own = {"labels": numbers.repeat(count), "texts": np.full(len(first), count)}
        own |= {"scores": examples["score"]} if "score" in examples else {}
        return batch | {name: torch.from_numpy(array) for name, array in own.items()}


def _encode(texts: Sequence[str], prompt: str, head: SentenceHead, encoder: Encoder) -> list[list[int]]:
    encoder.note(f"prompt {prompt!r}, put in front of texts", len(texts) if prompt else 0)
    note_prompt(prompt, texts, encoder)
    given = [prompt + text for text in texts]
    return encoder([text.lower() for text in given] if head.lower else given)["input_ids"]

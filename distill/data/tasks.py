"""Tasks, i.e. kinds of predictions: one function per task returns a `Task`, one row of `TASKS` names it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Task:
    """One kind of prediction: its tokens, its head and its metrics."""

    name: str
    head: Literal["sequence", "next_token"]
    """`sequence`: one prediction per example; `next_token`: position t predicts token t + 1."""
    auto_class: str
    """Name of the transformers Auto class with this head."""
    metrics: tuple[str, ...]
    """Measured unless the recipe says otherwise; the first is the one that stands in headlines."""
    encode: Callable[[Sequence[str], Any, int], list[np.ndarray]]
    """(texts, tokenizer, max_length) -> token ids, int32 [L_i] each."""


def classification() -> Task:
    """One class per text."""
    return Task(
        name="classification",
        head="sequence",
        auto_class="AutoModelForSequenceClassification",
        metrics=("accuracy", "f1_macro", "loss"),
        encode=encode_each,
    )


def causal_lm() -> Task:
    """Every token from the ones before it; texts are packed into blocks without padding."""
    return Task(
        name="causal_lm",
        head="next_token",
        auto_class="AutoModelForCausalLM",
        metrics=("perplexity", "token_accuracy", "loss"),
        encode=encode_packed,
    )


def encode_each(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[np.ndarray]:
    """Encode each text on its own, cut to `max_length` tokens, special tokens included."""
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return [np.array(ids, dtype=np.int32) for ids in encoded]


def encode_packed(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[np.ndarray]:
    """Put all texts into one stream, in their order, and cut it into blocks of exactly `max_length`.

    Each text stands there as the tokenizer writes it, with its start token where there is one, and with an end-of-text
    token behind it. Neither is doubled, also where a text brings its own.
    """
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    documents: list[list[int]] = []
    for ids in tokenizer(list(texts))["input_ids"]:
        document = _as_document(ids, start, end)
        # One token may be both: the end of a text is the start of the next one then.
        documents.append(document[1:] if documents and start == end and document[:1] == [end] else document)
    stream = np.concatenate([np.array(document, dtype=np.int32) for document in documents])
    blocks = len(stream) // max_length
    return list(stream[: blocks * max_length].reshape(blocks, max_length))


def _as_document(ids: Sequence[int], start: int | None, end: int | None) -> list[int]:
    """Give one text one start token, where it begins with any, and one end token, where the tokenizer has one."""
    ids = list(ids)
    while start is not None and ids[:2] == [start, start]:
        del ids[0]
    while end is not None and ids[-2:] == [end, end]:
        del ids[-1]
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


TASKS: dict[str, Callable[[], Task]] = {
    "classification": classification,
    "causal_lm": causal_lm,
}

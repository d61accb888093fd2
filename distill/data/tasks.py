"""What a model predicts: one function per task returns a `Task`, one row of `TASKS` names it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Task:
    """How text becomes tokens, which head predicts, and what is measured."""

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
    """Each text on its own, cut to `max_length` tokens, special tokens included."""
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return [np.array(ids, dtype=np.int32) for ids in encoded]


def encode_packed(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[np.ndarray]:
    """All texts in one stream, an end-of-text token after each, cut into blocks of exactly `max_length`."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream = np.concatenate([np.array([*ids, *end], dtype=np.int32) for ids in encoded])
    blocks = len(stream) // max_length
    return list(stream[: blocks * max_length].reshape(blocks, max_length))


TASKS: dict[str, Callable[[], Task]] = {
    "classification": classification,
    "causal_lm": causal_lm,
}

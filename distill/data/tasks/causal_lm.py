"""Every token from the ones before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from distill.data.tasks.task import Encoder, Features, Ragged, Seeds, Task, Values
from distill.models.forward import UNLABELLED, Batch


class CausalLM(Task):
    """Documents, as the tokenizer writes them; several may share a row, and none sees another."""

    name = "causal_lm"
    auto_class = "AutoModelForCausalLM"
    head = "next_token"
    metrics = ("perplexity", "token_accuracy", "loss")
    packed = divisible = True

    def encode(self, rows: Values, encoder: Encoder) -> Features:
        """Encode whole documents, each with its start and end token."""
        tokenizer = encoder.tokenizer
        ids = tokenizer(list(rows["text"]), verbose=False)["input_ids"]
        documents = [as_document(each, tokenizer.bos_token_id, tokenizer.eos_token_id) for each in ids]
        encoder.count(documents)
        return {"input_ids": documents, "labelled": [True] * len(documents)}

    def collate(self, examples: Mapping[str, Any], padding: int, seeds: Seeds) -> Batch:
        """Label every token; documents that share a row get positions that start anew, and their numbers."""
        batch = super().collate(examples, padding, seeds)
        real = batch["attention_mask"].bool()
        batch["labels"] = batch["input_ids"].masked_fill(~real, UNLABELLED)
        return batch | separate(examples["documents"], real) if "documents" in examples else batch


def as_document(ids: Sequence[int], start: int | None, end: int | None) -> list[int]:
    """Give one text one start token, where it begins with any, and one end token, where the tokenizer has one."""
    ids = list(ids)
    while start is not None and ids[:2] == [start, start]:
        del ids[0]
    while end is not None and ids[-2:] == [end, end]:
        del ids[-1]
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def separate(documents: Ragged, real: torch.Tensor) -> Batch:
    """Tell the documents of packed rows apart.

    Args:
        documents: Lengths of the documents in each row.
        real: Where the rows have a token, boolean [B, L].

    Returns:
        `position_ids` [B, L], which start anew with each document and at every token of padding, and `document_ids`
        [B, L]; nothing where every row holds one document.
    """
    if int(documents.lengths.max()) == 1:
        return {}
    positions, numbers = np.zeros(real.shape, np.int64), np.zeros(real.shape, np.int64)
    for row, lengths in enumerate(documents):
        end = int(lengths.sum())
        positions[row, :end] = np.concatenate([np.arange(length) for length in lengths])
        numbers[row, :end] = np.repeat(np.arange(len(lengths)), lengths)
    return {"position_ids": torch.from_numpy(positions), "document_ids": torch.from_numpy(numbers)}

"""Every token from the ones before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from distill.data.tasks.task import Encoder, Features, Ragged, Seeds, Task, Values
from distill.errors import InputError
from distill.models.forward import UNLABELLED, Batch, Outputs

SHORTEST_ROW = 3
"""Tokens: in a row of two, the rest of a document could be one that predicts nothing."""
NOTHING_TO_PREDICT = "documents of less than two tokens, which predict nothing, left out"


class CausalLM(Task):
    """Documents, as the tokenizer writes them; several may share a row, and none sees another."""

    name = "causal_lm"
    auto_class = "AutoModelForCausalLM"
    head = "next_token"
    observed: ClassVar[tuple[str, ...]] = ("text_bytes",)
    observed_in_training = True
    packed = divisible = True

    def encode(self, rows: Values, encoder: Encoder) -> Features:
        """Encode whole documents, each with its start and end token; of those that are measured count the bytes."""
        tokenizer, texts = encoder.tokenizer, list(rows["text"])
        check_row_length(encoder)
        spans = encoder.measured and tokenizer.is_fast
        encoded = tokenizer(texts, verbose=False, return_offsets_mapping=spans)
        examples: list[dict[str, Any]] = []
        for number, ids in enumerate(encoded["input_ids"]):
            first, last, end = limits(ids, tokenizer.bos_token_id, tokenizer.eos_token_id)
            document = [*ids[first:last], *end]
            if len(document) < 2:
                encoder.note(NOTHING_TO_PREDICT)
                continue
            examples.append({"input_ids": document, "labelled": True, "row": number})
            if encoder.measured:
                ends = [stop for _, stop in encoded["offset_mapping"][number][first:last]] if spans else None
                examples[-1]["text_bytes"] = share_bytes(texts[number], ends, len(document))
        return encoder.features(examples)

    def collate(self, examples: Mapping[str, Any], padding: int, seeds: Seeds) -> Batch:
        """Label every token; documents that share a row get positions that start anew, and their numbers."""
        batch = super().collate(examples, padding, seeds)
        real = batch["attention_mask"].bool()
        batch["labels"] = batch["input_ids"].masked_fill(~real, UNLABELLED)
        return batch | separate(examples["documents"], real) if "documents" in examples else batch

    def observe(self, _model: Any, _outputs: Outputs, _batch: Batch, examples: Mapping[str, Any]) -> dict[str, Any]:
        """Give the bytes of the text in each row."""
        return {name: [int(own.sum()) for own in examples[name]] for name in self.observed}


def check_row_length(encoder: Encoder) -> None:
    """Refuse rows in which documents would be cut into tokens that nothing predicts."""
    if encoder.spec.max_length < SHORTEST_ROW:
        raise InputError(f"data.max_length: a language model needs rows of {SHORTEST_ROW} or more tokens")


def limits(ids: Sequence[int], start: int | None, end: int | None) -> tuple[int, int, list[int]]:
    """Find the part of a text's tokens with one start token, where it begins with any, and at most one end token.

    Returns:
        First token, one more than the last, and the end token that is still to be added, where the tokenizer has one.
    """
    first, last = 0, len(ids)
    while start is not None and ids[first : first + 2] == [start, start]:
        first += 1
    while end is not None and last - first > 1 and ids[last - 2 : last] == [end, end]:
        last -= 1
    return first, last, [] if end is None or (last > first and ids[last - 1] == end) else [end]


def share_bytes(text: str, ends: Sequence[int] | None, count: int) -> np.ndarray:
    """Share the bytes of a text, in UTF-8, out over its tokens, so that their sum is exact.

    Args:
        text: The whole text.
        ends: The character of the text where each token ends, special tokens 0. A token gets what lies between the
            ends before it and its own, white space that no token writes included; those that share a character leave
            it to the first. None, for tokenizers that do not tell: the bytes are spread evenly.
        count: Number of tokens; those beyond `ends` get nothing, and the last one with an end all that is left.

    Returns:
        int64 [count].
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if not ends:
        return np.diff(np.arange(count + 1) * size // count)
    widths = [len(character.encode("utf-8", "surrogatepass")) for character in text]
    upto = np.maximum.accumulate(np.cumsum([0, *widths])[list(ends)])
    upto[-1] = size
    return np.pad(np.diff(upto, prepend=0), (0, count - len(upto)))


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

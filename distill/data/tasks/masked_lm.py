"""The tokens of a text that are masked, from all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from distill.data.tasks.task import Encoder, Features, Ragged, Seeds, Task, Values
from distill.errors import InputError
from distill.models.forward import UNLABELLED, Batch
from distill.recipe.schema import Data

MASKED, REPLACED = 0.8, 0.1
"""Shares of the tokens to be predicted that become the mask token and a random one; the rest stays as it is."""


class MaskedLM(Task):
    """Pieces of texts, each with its special tokens; which tokens are masked follows from the seeds of an example."""

    name = "masked_lm"
    auto_class = "AutoModelForMaskedLM"
    head = "masked_token"
    divisible = draws = True

    def constants(self, tokenizer: Any, spec: Data) -> dict[str, Any]:
        """Return the mask token, the tokens that are never masked, and how much is masked."""
        if tokenizer.mask_token_id is None:
            raise InputError(
                "task: masked_lm needs a tokenizer with a mask token; use task: causal_lm for this teacher"
            )
        special = {token for token, own in tokenizer.added_tokens_decoder.items() if own.special}
        return {
            "mask": tokenizer.mask_token_id,
            "special": sorted({*special, *tokenizer.all_special_ids}),
            "vocabulary": len(tokenizer),
            "share": spec.mask_share,
        }

    def encode(self, rows: Values, encoder: Encoder) -> Features:
        """Cut each text into pieces of `max_length` tokens, special ones included."""
        tokenizer, limit = encoder.tokenizer, encoder.spec.max_length
        own = tokenizer.num_special_tokens_to_add()
        if limit <= own:
            raise InputError(f"data.max_length: {limit} tokens leave no room beside {own} special ones")
        if not tokenizer.is_fast:
            raise InputError("task: masked_lm needs a tokenizer that cuts texts into pieces (tokenizer.json)")
        encoded = tokenizer(
            list(rows["text"]), truncation=True, max_length=limit, return_overflowing_tokens=True, verbose=False
        )
        special = self.constants(tokenizer, encoder.spec)["special"]
        pieces = list(zip(encoded["input_ids"], encoded["overflow_to_sample_mapping"], strict=True))
        kept = [(ids, row) for ids, row in pieces if not np.isin(ids, special).all()]
        encoder.note("pieces without a token that could be masked, left out", len(pieces) - len(kept))
        return encoder.features([{"input_ids": ids, "labelled": True, "row": row} for ids, row in kept])

    def collate(self, examples: Mapping[str, Any], padding: int, seeds: Seeds) -> Batch:
        """Mask tokens and label them; an example has the same masks in whatever batch it is."""
        ids: Ragged = examples["input_ids"]
        special, vocabulary = np.array(examples["special"]), examples["vocabulary"]
        ordinary = np.setdiff1d(np.arange(vocabulary), special)
        shown, labels = [], []
        for own, seed in zip(ids, seeds, strict=True):
            chosen, seen = mask(own, examples["share"], examples["mask"], special, ordinary, seed)
            shown.append(seen)
            labels.append(np.where(chosen, own, UNLABELLED))
        batch = super().collate({**examples, "input_ids": replace(ids, flat=np.concatenate(shown))}, padding, seeds)
        return batch | {"labels": torch.from_numpy(replace(ids, flat=np.concatenate(labels)).pad(UNLABELLED))}


def mask(
    ids: np.ndarray, share: float, token: int, special: np.ndarray, ordinary: np.ndarray, seed: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the tokens of one example that are to be predicted, at least one, and hide most of them, as BERT does.

    Args:
        ids: Tokens [L].
        share: Share of the tokens that are not special, rounded.
        token: The mask token.
        special: Tokens that are never chosen.
        ordinary: Tokens that may stand in the place of others.
        seed: All that is drawn follows from it.

    Returns:
        Where a token is to be predicted, boolean [L], and what the model is shown [L].
    """
    random = np.random.default_rng(seed)
    maskable = np.flatnonzero(~np.isin(ids, special))
    places = random.permutation(maskable)[: max(1, round(share * len(maskable)))]
    draws, others = random.random(len(places)), random.choice(ordinary, len(places))
    shown = ids.copy()
    shown[places] = np.select([draws < MASKED, draws < MASKED + REPLACED], [token, others], ids[places])
    chosen = np.zeros(len(ids), dtype=bool)
    chosen[places] = True
    return chosen, shown

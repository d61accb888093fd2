"""What the host knows about the padding of a batch, so that nobody has to ask the device.

transformers reads the values of a mask to see whether anything is padding at all, and those of positions to see whether
rows hold several documents. On an accelerator the host would wait for both, at the start of every forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils

PADDED, UNPADDED = "padded", "unpadded"
"""Entries of a batch in which the host has seen that something is padding, or that nothing is; with neither, nobody has
looked. Only that they are there counts, their values [B] do not. A batch without padding goes into models without a
mask, so that attention takes its fastest kernel."""
READS_AT_ONCE = ("cpu",)
"""Devices whose values are read without waiting, and where transformers looks for itself."""


def mark_padding(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Look for padding in a batch of texts on the host, and add the mark; a batch of sound is returned as it is."""
    if "input_ids" not in batch or "attention_mask" not in batch:
        return batch
    mask = batch["attention_mask"]
    return {**batch, UNPADDED if bool(mask.all()) else PADDED: mask.new_ones(len(mask), dtype=torch.bool)}


@contextmanager
def padding_known(batch: dict[str, Tensor], inputs: Mapping[str, Any]) -> Iterator[None]:
    """Answer transformers' questions about a marked batch during the block, instead of reading values on the device.

    Rows hold several documents where a model gets `position_ids`, and a mask that it gets hides something. Versions of
    transformers without these functions ask the device as ever.

    Args:
        batch: With or without a mark.
        inputs: What the model gets of it.
    """
    if PADDED not in batch and UNPADDED not in batch:
        yield
        return
    answers: dict[tuple[Any, str], Any] = {
        (masking_utils, "find_packed_sequence_indices"): _documents if "position_ids" in inputs else _nothing,
        # Without a mask it would look for padding, to warn of it.
        (PreTrainedModel, "warn_if_padding_and_no_attention_mask"): _nothing,
    }
    masked = "attention_mask" in inputs or "decoder_attention_mask" in inputs
    if masked and next(iter(batch.values())).device.type not in READS_AT_ONCE:
        for name in ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa"):
            answers[masking_utils, name] = partial(_only_without_mask, getattr(masking_utils, name, None))
    plain = {(owner, name): getattr(owner, name) for owner, name in answers if hasattr(owner, name)}
    try:
        for owner, name in plain:
            setattr(owner, name, answers[owner, name])
        yield
    finally:
        for (owner, name), function in plain.items():
            setattr(owner, name, function)


def _documents(position_ids: Tensor) -> Tensor:
    """Number the documents of each row, [B, L]: a new one begins where positions do not go on."""
    return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def _nothing(*_args: Any) -> None:
    return None


def _only_without_mask(plain: Any, padding_mask: Tensor | None, *args: Any, **named: Any) -> bool:
    return padding_mask is None and bool(plain(padding_mask, *args, **named))

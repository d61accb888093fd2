"""What the host knows about the padding of a batch, so that nobody has to ask the device.

transformers reads the values of a mask to see whether anything is padding at all, and those of positions to see whether
rows hold several documents. On an accelerator the host would wait for both, at the start of every forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

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
def padding_known(batch: dict[str, Tensor]) -> Iterator[None]:
    """Answer transformers' questions about a marked batch during the block, instead of reading values on the device.

    Rows hold several documents where the batch has `position_ids`, and a mask hides something where the batch is
    marked as padded. Versions of transformers without these functions ask the device as ever.
    """
    if PADDED not in batch and UNPADDED not in batch:
        yield
        return
    answers: dict[str, Any] = {"find_packed_sequence_indices": _documents if "position_ids" in batch else _no_documents}
    if PADDED in batch and batch[PADDED].device.type not in READS_AT_ONCE:
        for name in ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa"):
            if plain := getattr(masking_utils, name, None):
                answers[name] = partial(_only_without_mask, plain)
    plain_ones = {name: getattr(masking_utils, name) for name in answers if hasattr(masking_utils, name)}
    try:
        for name in plain_ones:
            setattr(masking_utils, name, answers[name])
        yield
    finally:
        for name, plain in plain_ones.items():
            setattr(masking_utils, name, plain)


def _documents(position_ids: Tensor) -> Tensor:
    """Number the documents of each row, [B, L]: a new one begins where positions do not go on."""
    return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def _no_documents(_position_ids: Tensor) -> None:
    return None


def _only_without_mask(plain: Callable[..., bool], padding_mask: Tensor | None, *args: Any, **named: Any) -> bool:
    return padding_mask is None and plain(padding_mask, *args, **named)

"""Keys of what a model reads: the same for a text in whatever batch it is, and for nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from torch import Tensor

from distill.models.forward import MODEL_INPUTS, UNLABELLED, Batch

KEY = 16
"""Bytes of a key."""


def row_keys(batch: Batch, marks: Sequence[Tensor], reads: Sequence[str] = ()) -> np.ndarray:
    """Hash each row of a batch: everything that a model reads of it, without padding; uint8 [B, KEY].

    Args:
        batch: On any device.
        marks: Masks [B, ...] of the positions whose outputs are wanted: rows that ask for others have other keys.
        reads: Entries that the model reads beside `MODEL_INPUTS`: the labels that a decoder is fed.
    """
    given = {name: batch[name].cpu().numpy() for name in (*MODEL_INPUTS, *reads) if name in batch}
    places = [mark.cpu().numpy() for mark in marks]
    real = given.pop("attention_mask").astype(bool) if "input_ids" in given and "attention_mask" in given else None
    shown = given.pop("decoder_attention_mask", None)
    keys = np.empty((len(next(iter(given.values()))), KEY), np.uint8)
    for row, key in enumerate(keys):
        digest = blake2b(digest_size=KEY)
        for name, values in given.items():
            mask = shown if name.startswith("decoder") else real
            own = _without_padding(name, values[row], None if mask is None else mask[row].astype(bool))
            if own is not None:
                digest.update(f"{name} {own.dtype.str} {own.shape} ".encode())
                digest.update(np.ascontiguousarray(own).data)
        for mark in places:
            digest.update(b"positions " + np.flatnonzero(mark[row]).tobytes())
        key[:] = np.frombuffer(digest.digest(), np.uint8)
    return keys


def _without_padding(name: str, values: np.ndarray, mask: np.ndarray | None) -> np.ndarray | None:
    """Leave out what only the other rows of a batch put there; None for positions that every text has."""
    if name == "labels":
        given = np.flatnonzero(values != UNLABELLED)
        return values[: given[-1] + 1 if len(given) else 0]
    own = values if mask is None or values.shape != mask.shape else values[mask]
    # Whether a batch has positions at all depends on the other rows: one document alone needs none.
    return None if name == "position_ids" and np.array_equal(own, np.arange(len(own))) else own


class Index:
    """Finds rows by their keys."""

    def __init__(self, keys: np.ndarray):
        self.rows = np.argsort(_as_text(keys), kind="stable")
        self.keys = _as_text(keys)[self.rows]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the first row of each key, int64 [B]; -1 where there is none."""
        wanted = _as_text(keys)
        places = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        return np.where(self.keys[places] == wanted, self.rows[places], -1)


def _as_text(keys: np.ndarray) -> np.ndarray:
    """View keys as text of one length, which numpy sorts, [B]."""
    return keys.view(f"S{KEY}")[:, 0]

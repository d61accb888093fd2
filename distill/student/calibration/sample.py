"""The calibration sample: padding on the right, one example at a time, and random numbers that follow from content.

A batch holds `input_ids` [B, L] or `input_features`, and for encoder-decoders `decoder_input_ids`; each with its own
mask, `attention_mask` and `decoder_attention_mask`. Without a mask every position is real.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from distill.models.forward import Batch, model_inputs, row_count
from distill.models.layout import StackName


def real_positions(batch: Batch, side: StackName) -> Tensor | None:
    """The mask of one stack's positions, or None where all are real."""
    decoder = side == "main" and "decoder_input_ids" in batch
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    return None if mask is None else mask.bool()


def pad_right(batch: Batch, sets: bool = False) -> Batch:
    """Move each row's real positions to its front.

    Models with absolute positions see other positions behind padding on the left. Statistics are of the text alone.
    With `sets`, labels are of classes [B, V], not of positions, though there may be as many of each.
    """
    moved = dict(batch)
    for mask, names in _by_mask(batch, sets):
        if bool((mask[:, :-1] < mask[:, 1:]).any()):
            order = (~mask.bool()).int().argsort(dim=-1, stable=True)
            moved |= {name: batch[name].gather(1, order) for name in names}
    return moved


def examples(batch: Batch, sets: bool = False) -> Iterator[Batch]:
    """Yield each row alone, without its padding (which `pad_right` has moved to the end); `sets` as there."""
    for row in range(row_count(batch)):
        single = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        for mask, names in list(_by_mask(single, sets)):
            single |= {name: single[name][:, : int(mask.sum())] for name in names}
        yield single


def content_seed(example: Batch) -> int:
    """Derive a seed from what the model reads, the same whatever batch or rank the example is in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model_inputs(example).items()):
        digest.update(f"{name}:{list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest()[:7])


def draw_classes(logits: Tensor, seed: int) -> Tensor:
    """Draw one class per row of logits [N, V] from their softmax; the same on every device up to rounding."""
    cumulated = torch.softmax(logits.float(), dim=-1).cumsum(dim=-1)
    uniform = torch.rand(len(logits), generator=torch.Generator().manual_seed(seed)).to(logits.device)
    chosen = torch.searchsorted(cumulated, (uniform * cumulated[:, -1])[:, None], right=True).squeeze(-1)
    return chosen.clamp(max=logits.shape[-1] - 1)


def _by_mask(batch: Batch, sets: bool) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield each mask with the names of the tensors that have its shape and belong to its side."""
    two_sided = "decoder_input_ids" in batch
    for prefix in ("decoder_", ""):
        mask = batch.get(f"{prefix}attention_mask")
        if mask is None:
            continue
        same = [
            name for name, tensor in batch.items() if tensor.shape == mask.shape and not (sets and name == "labels")
        ]
        of_decoder = [name for name in same if name.startswith("decoder_") or (two_sided and name == "labels")]
        yield mask, of_decoder if prefix else [name for name in same if name not in of_decoder]

"""Test by trial that a model does not see what it is to predict."""

from __future__ import annotations

from typing import Any

import torch

from distill.errors import InputError
from distill.models.cost import random_ids
from distill.models.forward import logits_of, to_device

TRIAL_LENGTH = 8
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Share of the change at the last token that another order of sums explains in earlier logits: experts are given their
tokens in groups."""
HALF_ROUNDING = 0.02
"""The same for half precision."""


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Refuse a model whose logits at earlier tokens change with the last one; takes two passes over a short text.

    The decoder of an encoder-decoder is given its target text shifted, and is not tried.

    Raises:
        InputError: With the size of the change.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        return
    ids = random_ids(model.config.vocab_size, (1, TRIAL_LENGTH), model)
    other = ids.clone()
    other[:, -1] = ids[:, 0] if ids[0, 0] != ids[0, -1] else ids[:, 1]
    batches = ({"input_ids": each, "attention_mask": torch.ones_like(ids)} for each in (ids, other))
    first, second = (logits_of(model, to_device(batch, model.device)) for batch in batches)
    change = (first - second).abs().amax((0, 2))
    before, last = change[:-1].max().item(), change[-1].item()
    if before > ROUNDING.get(model.dtype, HALF_ROUNDING) * last:
        raise InputError(
            f"teacher.model: in this {model.config.model_type} a token sees those after it, which the task lets it "
            f"predict: another last token changes earlier logits by {before:.3g} and its own by {last:.3g}; name a "
            f"decoder"
        )

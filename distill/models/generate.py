"""Let a model write texts of its own."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from distill.models.forward import Batch, model_inputs


@torch.no_grad()
def write_greedily(model: Any, batch: Batch, limit: int, **settings: Any) -> Tensor:
    """Let an encoder-decoder write a text for each source, at most `limit` tokens, the likeliest one each time.

    Forced tokens, shortest lengths and the like are those of the model's own generation config, `settings` go before.

    Returns:
        Token ids [B, T], with special tokens.
    """
    source = {name: tensor for name, tensor in model_inputs(batch).items() if not name.startswith("decoder_")}
    own = {"max_new_tokens": limit, "max_length": None, "do_sample": False, "num_beams": 1, **settings}
    return cast("Tensor", model.generate(**source, **own))

"""Small models to start from in place of a cut student, with the tokenizer of a tiny project's teacher."""

from __future__ import annotations

from tiny import RECIPE, tiny_config
from transformers import AutoModel, AutoTokenizer

GIVEN = RECIPE.replace(
    "  layers: {keep: 2, choose: every}\n  mlp: {keep: 0.5, multiple_of: 8}\n"
    "  calibration: {examples: 16, batch_size: 8}\n",
    "  from: ./small\n",
)
FITTED = GIVEN.replace("  init: random\n", "").replace(
    "  fit: {steps: 12, batch_size: 8, micro_batch_size: 4, lr: 3e-3, save_every: 4}\n", ""
)
"""The same with a teacher that is trained already."""
TINY = {"hidden_size": 16, "dim": 16, "num_hidden_layers": 2, "n_layers": 2, "hidden_dim": 24}
GPT2 = {"vocab_size": 72, "hidden_size": 16, "n_embd": 16, "num_hidden_layers": 2, "n_layer": 2, "n_inner": 24}


def small(folder, family="distilbert", head=AutoModel, *, name="small", **changes):
    """A small model of that name with the teacher's tokenizer."""
    AutoTokenizer.from_pretrained(folder / "teacher").save_pretrained(folder / name)
    head.from_config(tiny_config(family, pad_token_id=0, **changes)).save_pretrained(folder / name)

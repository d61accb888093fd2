"""Weights of a teacher by their headers alone: names, shapes and dtypes, with zeros behind them."""

from __future__ import annotations

import json
from typing import Any

PARTS = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense", "output.LayerNorm")
BERT = [
    "embeddings.word_embeddings.weight",
    *(f"encoder.layer.{layer}.{part}.weight" for layer in range(6) for part in PARTS),
]


def weights(names: list[str], data: bytes | None = None, **different: Any) -> bytes:
    """A safetensors file with a tensor of one float for each name; `different` says otherwise of the first."""
    tensors = {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
    tensors[names[0]] |= different
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    return len(header).to_bytes(8, "little") + header + (bytes(4 * len(names)) if data is None else data)

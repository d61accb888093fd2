"""The header of a GGUF file: sizes of a quantised teacher, read without any package.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any, BinaryIO

from distill.errors import InputError
from distill.recipe.locate import TeacherSize, check_sizes

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a value -> its format in `struct`."""
TEXT, ARRAY = 8, 9
MOST = 10_000_000
"""Bytes of a text, and entries of an array or a header, beyond which it is none."""
SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "expert_count": "num_experts",
}
"""Key of a size -> its name in a config.json."""
FAMILIES = {"gemma3": "gemma3_text", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
"""Architecture -> `model_type`, where they differ."""


def gguf_size(path: Path) -> TeacherSize:
    """Read layers, MLP width, positions and family of a GGUF file.

    Raises:
        InputError: It is none, is cut off, is one part of several, or the package that reads its weights is missing.
    """
    header = read_header(path)
    if header.get("split.count", 1) > 1:
        raise InputError(f"{path} is one of {header['split.count']} parts; join them with llama-gguf-split --merge")
    architecture = str(header.get("general.architecture"))
    layers, width, positions, vocabulary = (
        value if type(value := header.get(f"{architecture}.{key}")) is int and value > 0 else None
        for key in ("block_count", "feed_forward_length", "context_length", "vocab_size")
    )
    check_sizes(path, {name: header.get(f"{architecture}.{key}") for key, name in SIZES.items()})
    tokens = header.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise InputError(f"{path} holds no tokenizer; name a file that does")
    if vocabulary is not None and tokens > vocabulary:
        raise InputError(f"{path}: the tokenizer has {tokens:,} tokens, the model {vocabulary:,} embeddings")
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{path}: a GGUF teacher needs the package gguf: pip install 'distill[gguf]'")
    family = FAMILIES.get(architecture, architecture)
    return TeacherSize(layers, width, positions, family=family, vocabulary=vocabulary)


def read_header(path: Path) -> dict[str, Any]:
    """Read the metadata of a GGUF file, of arrays their length. Raises InputError where it is not one."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{path} is not a GGUF file")
            version, _tensors, count = _numbers(file, "<IQQ")
            if version not in (2, 3) or count > MOST:
                raise InputError(f"{path} is a GGUF file of version {version}; 2 and 3 are read")
            header = {}
            for _ in range(count):
                key = _text(file)
                header[key] = _value(file, *_numbers(file, "<I"))
    except (OSError, ValueError, struct.error, MemoryError, OverflowError) as error:
        raise InputError(f"{path} is broken or was not copied whole: {error}") from error
    return header


def _value(file: BinaryIO, kind: int) -> Any:
    if kind in NUMBERS:
        return _numbers(file, f"<{NUMBERS[kind]}")[0]
    if kind == TEXT:
        return _text(file)
    if kind != ARRAY:
        raise ValueError(f"a value of unknown type {kind}")
    inner, length = _numbers(file, "<IQ")
    if length > MOST or inner == ARRAY:
        raise ValueError(f"an array of {length:,} values of type {inner}")
    if inner in NUMBERS:
        file.seek(length * struct.calcsize(NUMBERS[inner]), 1)
    else:
        for _ in range(length):
            _text(file)
    return length


def _numbers(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _text(file: BinaryIO) -> str:
    (length,) = _numbers(file, "<Q")
    if length > MOST:
        raise ValueError(f"a text of {length:,} bytes")
    content = file.read(length)
    if len(content) < length:
        raise ValueError("it ends within a text")
    return content.decode(errors="replace")

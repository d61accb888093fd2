"""The weight files of a model folder: which ones are loaded, that they lie in it, and their checksum.

`transformers` follows what `config.json` and an index say, out of the folder and into other formats as well. Here the
files are found by the same rules, and refused where they are not safetensors files of the folder itself.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.errors import DistillError, InputError
from distill.files import read_object, sha256_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Parts of a checkpoint of distributed training, which transformers prefers to everything else in a folder."""


@contextmanager
def as_input_error(what: str) -> Iterator[None]:
    """Turn an error that a library raises over the user's files into one InputError that begins with `what`.

    A broken file makes libraries raise almost anything: KeyError for an unknown activation, ZeroDivisionError for no
    heads, ImportError for a package that only this folder needs. Only library calls belong into the block.
    """
    try:
        yield
    except (DistillError, MemoryError):
        raise
    except Exception as error:
        text = str(error).strip()
        named = text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__}: {text}"
        raise InputError(f"{what}: {named}") from error


def check_links(folder: Path) -> None:
    """Refuse links that lead out of a model folder; their targets would be copied into students and releases.

    A snapshot of the model hub is made of links into its own `blobs`. The folder itself may be a link.
    """
    for path in (*folder.iterdir(), *folder.glob("*/*")):
        if path.is_symlink() and not _is_inside(folder, path):
            raise InputError(f"{path} is a link to a place outside of {folder}; copy what is meant into the folder")


def _is_inside(folder: Path, path: Path) -> bool:
    root, target = folder.resolve(), path.resolve()
    snapshot = root.parent.name == "snapshots"
    return target.is_relative_to(root) or (snapshot and target.is_relative_to(root.parent.parent / "blobs"))


def weight_files(folder: Path) -> list[Path]:
    """Return the files that the folder's weights are loaded from, ordered by name.

    Raises:
        InputError: There are none, or something else than safetensors files inside the folder would be loaded.
    """
    if distributed := next((file for file in folder.iterdir() if _DISTRIBUTED.fullmatch(file.name)), None):
        raise InputError(f"{folder} holds parts of a training checkpoint ({distributed.name}); save it as one model")
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder} holds an adapter (adapter_config.json); merge it into the weights, or remove it")
    named = read_object(folder / "config.json").get("transformers_weights")
    found = [named] if named is not None else [name for name in (SINGLE, INDEX) if (folder / name).is_file()]
    if not found:
        raise InputError(f"{folder} has no weights that are read: there is neither {SINGLE} nor {INDEX}")
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
    if Path(name).name != name or not _is_inside(folder, folder / name):
        raise InputError(f"{folder}: {origin} names {name}, which does not lie in the folder itself")
    if not (folder / name).is_file():
        raise InputError(f"{folder}: {origin} names {name}, which does not exist")
    return folder / name


def weights_sha256(folder: Path) -> str:
    """Return the checksum that pins the folder's weights.

    Of weights in one file its sha256; of several files the sha256 of the lines that `sha256sum` prints for them in the
    order of their names (`sha256sum model-*.safetensors | sha256sum`).
    """
    files = weight_files(folder)
    if len(files) == 1:
        return sha256_of(files[0])
    lines = "".join(f"{sha256_of(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()

"""The files of a model folder: that they lie in it, the checksum of its weights, and errors of reading them."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.errors import DistillError, InputError
from distill.files import parts_of, read_json, sha256_of
from distill.recipe.weights import is_inside, weight_files


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
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of a library in Rust
            raise
        text = str(error).strip()
        named = text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__}: {text}"
        raise InputError(f"{what}: {named}") from error


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError where what runs a stranger's program takes longer; threads beside the main one may go on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: Any) -> None:
        raise TimeoutError(f"it takes longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_files(folder: Path) -> None:
    """Refuse what would bring files from elsewhere into students and releases, or would never end when it is read.

    A snapshot of the model hub is made of links into its own `blobs`. The folder itself may be a link.

    Raises:
        InputError: A link leads out of the folder or to nothing, the tokenizer's config names a file elsewhere, or
            there is something that is neither a file nor a folder.
    """
    for path in (*folder.iterdir(), *folder.glob("*/*")):
        if path.is_symlink() and not is_inside(folder, path):
            raise InputError(f"{path} is a link to a place outside of {folder}; copy what is meant into the folder")
        if not (path.is_file() or path.is_dir()):
            raise InputError(f"{path} is no regular file; remove it")  # a pipe, or a link to nothing
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for text in parts_of(read_json(folder / name)) if (folder / name).is_file() else ():
            if isinstance(text, str) and os.path.isfile(folder / text) and not is_inside(folder, folder / text):
                raise InputError(f"{folder / name} names {text}, a file that does not lie in the folder; remove it")


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

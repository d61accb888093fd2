"""Files of tensors in one folder, each complete or not there, named by its content, and looked at before it is used."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from distill.errors import InputError
from distill.files import flush, sha256_of

END = ".safetensors"
PLACE = "place"
"""Entry of a file's header that says where it belongs. One entry only: the order of several is not always the same."""


class ShardFolder:
    """Named tensors in a folder; a file's name ends with the sha256 of its content.

    Several processes, also those of other runs, may write at a time: whoever holds the lock of a number writes its
    files, and locks end with their process.
    """

    def __init__(self, root: Path):
        self.root = root

    def names(self, group: str = "") -> set[str]:
        """List the names of the finished files of a group."""
        files = (self.root / group).glob(f"*-*{END}")
        return {f"{group}/{file.name.rpartition('-')[0]}".lstrip("/") for file in files}

    def find(self, name: str) -> Path | None:
        """Find the finished file of a name; of several, which differ in rounding at most, always the same."""
        path = self.root / name
        return min(path.parent.glob(f"{path.name}-*{END}"), default=None)

    def whole(self, name: str, say: Callable[[str], None] | None) -> bool:
        """Tell whether a file is there; where `say` is given, whether it is whole: else it is removed, with a line."""
        path = self.find(name)
        if path is None or say is None:
            return path is not None
        if fault := self.fault_of(name, path):
            say(f"  {path} {fault}; made anew")
            path.unlink(missing_ok=True)
        return not fault

    def write(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
        """Publish the tensors of a name at once: they are there after a crash, or nothing is."""
        header = {PLACE: json.dumps({"cache": self.root.name, "name": name, **(facts or {})}, sort_keys=True)}
        content = save({key: tensor.contiguous() for key, tensor in tensors.items()}, header)
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)  # the disk may be full
            raise
        os.replace(temporary, path.with_name(f"{path.name}-{hashlib.sha256(content).hexdigest()}{END}"))
        flush(path.parent)

    def fault_of(self, name: str, path: Path) -> str | None:
        """Say what is wrong with a file, of which all is read; None for one that is as it was written."""
        try:
            if sha256_of(path) != path.name.removesuffix(END).rpartition("-")[2]:
                return "is not what was written: its sha256 is another one"
            with safe_open(path, "pt") as file:
                found = json.loads(file.metadata()[PLACE])
        except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
            return f"cannot be read: {error}"
        belongs = (found.get("cache"), found.get("name"))
        return None if belongs == (self.root.name, name) else f"belongs to {'/'.join(map(str, belongs))}"

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Map the tensors of a name into memory, once all of the file has been looked at; and the facts about them.

        Raises:
            InputError: There is none, or it is damaged; it is removed then, so that the cache is made whole again.
        """
        path = self.find(name)
        if path is None:
            raise InputError(f"{self.root / name}: this part of the cached teacher is gone; the same command makes it")
        if fault := self.fault_of(name, path):
            path.unlink(missing_ok=True)
            raise InputError(f"{path} {fault}; it is removed, and the same command makes it anew")
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()[PLACE])
        return load_file(path), facts

    @contextmanager
    def locked(self, number: int, *, wait: bool) -> Iterator[bool]:
        """Hold the lock of a number; false where another process has it, unless this one shall wait."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("ab") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
            except (BlockingIOError, PermissionError):
                yield False
                return
            yield True

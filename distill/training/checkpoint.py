"""Checkpoints that are either complete or not there.

A checkpoint is written into a temporary folder, every file is flushed to the disk, a manifest of sha256 sums is written
last, and one rename publishes it. Only safetensors and JSON: loading runs no code. The newest two valid ones are kept,
and a start takes the newest one whose manifest holds, naming those it passes over.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.errors import RunError
from distill.rundir import fsync_folder, sha256_of, write_text

KEEP = 2
MANIFEST = "MANIFEST.json"
STATE = "state.json"
HEADROOM = 2**20
"""Bytes beside the tensors: headers, JSON, the folder itself."""

Parts = Mapping[str, Mapping[str, Tensor]]
"""Name of a file without its ending -> the tensors in it. A part without tensors has no file."""


@dataclass
class TrainState:
    """Everything that survives a restart besides tensors.

    Sample order, learning rate and random numbers are functions of the step, so the step is nearly all there is.
    """

    step: int = 0
    """Optimizer steps done."""
    examples: int = 0
    """Examples seen."""
    tokens: int = 0
    """Tokens seen, padding not counted."""
    seconds: float = 0.0
    """Time spent in training, over all restarts."""
    halvings: int = 0
    """How often micro-batches were halved for want of memory."""
    evaluated: int = 0
    """Step of the last evaluation."""
    best: float | None = None
    """Best value of the metric of `keep_best` so far."""


class Checkpoints:
    """The published checkpoints of one training in one folder."""

    def __init__(self, folder: Path, identity: str, say: Callable[[str], None], keep: int = KEEP):
        """Nothing is read or written yet.

        Args:
            folder: Holds `step-00000100` folders, also those of trainings with other inputs, which are never touched.
            identity: Fingerprint of what is being trained; a checkpoint with another one is not continued.
            say: Where notices go.
            keep: How many valid ones are kept.
        """
        self.folder, self.identity, self.say, self.keep = folder, identity, say, keep
        self._verified: dict[Path, list[tuple[str, int, int]]] = {}

    def published(self) -> list[Path]:
        """Published checkpoints, oldest first; none of them verified."""
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []

    def newest_valid(self) -> Path | None:
        """The newest checkpoint that is intact and belongs to this training; every newer one is named."""
        for stale in self.folder.glob(".tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)  # another process of this run may be sweeping too
        for checkpoint in reversed(self.published()):
            fault = fault_of(checkpoint, self.identity)
            if fault is None:
                self._verified[checkpoint] = _signature(checkpoint)
                return checkpoint
            self.say(f"checkpoint {checkpoint.name} is passed over: {fault}")
        return None

    def last_good(self) -> str:
        """For messages: where the same command continues."""
        good = [checkpoint for checkpoint in self.published() if self._valid(checkpoint)]
        return f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"

    def save(self, state: TrainState, parts: Parts) -> Path:
        """Publish `step-00000100`, then remove what is older than the newest valid ones of this training.

        Args:
            state: Where training stands.
            parts: Tensors by file.

        Raises:
            RunError: Not enough space, or weights that are not finite; nothing is left of it.
        """
        final = self.folder / f"step-{state.step:08d}"
        temporary = self.folder / f".tmp-{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        self._check(temporary, parts)
        try:
            _write(temporary, json.dumps({"identity": self.identity, **asdict(state)}, indent=1), parts)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(f"a checkpoint cannot be written: {error}; {self.last_good()}") from error
        self._make_way(final)
        os.rename(temporary, final)
        fsync_folder(self.folder)
        self._verified[final] = _signature(final)
        self._retire()
        return final

    def _check(self, temporary: Path, parts: Parts) -> None:
        """Refuse to write what does not fit, or what is not worth keeping."""
        need = HEADROOM + sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values())
        free = shutil.disk_usage(temporary).free
        broken = [key for key, tensor in parts.get("model", {}).items() if not bool(torch.isfinite(tensor).all())]
        if free >= need and not broken:
            return
        shutil.rmtree(temporary)
        if broken:
            raise RunError(f"weights are not finite ({', '.join(broken[:3])}): not saved; {self.last_good()}")
        raise RunError(
            f"a checkpoint needs {need / 1e6:,.0f} MB and {self.folder} has {free / 1e6:,.0f} MB left: not saved; "
            f"{self.last_good()}. Make space, and the same command continues from it"
        )

    def _retire(self) -> None:
        own = [found for found in self.published() if _identity_of(found) == self.identity]
        good = [found for found in own if self._valid(found)]
        for old in own[: own.index(good[-self.keep])] if len(good) >= self.keep else []:
            shutil.rmtree(old)
            self._verified.pop(old, None)

    def _valid(self, checkpoint: Path) -> bool:
        """Whether it verifies; what this process has verified before is read again only when it has changed."""
        if self._verified.get(checkpoint) == _signature(checkpoint):
            return True
        if fault_of(checkpoint, self.identity) is not None:
            return False
        self._verified[checkpoint] = _signature(checkpoint)
        return True

    def _make_way(self, final: Path) -> None:
        """The same step of this training did not verify and is replaced; that of another training is kept beside."""
        if not final.exists():
            return
        other = _identity_of(final)
        if other is None or other == self.identity:
            shutil.rmtree(final)
        else:
            os.rename(final, final.with_name(f"{final.name}.{other[:8]}"))


def fault_of(checkpoint: Path, identity: str) -> str | None:
    """Why a checkpoint cannot be used, or None. Reads every byte of it."""
    try:
        sums = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        found = {file.name for file in checkpoint.iterdir()} - {MANIFEST}
        if not {STATE, "model.safetensors"} <= sums.keys():
            return "its manifest is incomplete"
        if found != sums.keys():
            return f"its files are not those of its manifest: {', '.join(sorted(found ^ sums.keys()))}"
        for name, expected in sums.items():
            if (checkpoint / name).is_symlink() or sha256_of(checkpoint / name) != expected:
                return f"{name} does not match its checksum"
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if state["identity"] != identity:
            return "it was made from another recipe, teacher or data"
        return None if checkpoint.stem == f"step-{state['step']:08d}" else f"it is of step {state['step']}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"it is incomplete ({type(error).__name__}: {error})"


def load(checkpoint: Path) -> tuple[TrainState, dict[str, dict[str, Tensor]]]:
    """What a verified checkpoint holds: where training stood, and the tensors of each part."""
    fields = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    fields.pop("identity")
    return TrainState(**fields), {file.stem: load_file(file) for file in checkpoint.glob("*.safetensors")}


def _write(folder: Path, state: str, parts: Parts) -> None:
    for name, tensors in parts.items():
        if tensors:
            own = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(own, folder / f"{name}.safetensors")
    write_text(folder / STATE, state)
    write_text(folder / MANIFEST, json.dumps(_sums(folder), indent=1))
    fsync_folder(folder)


def _sums(folder: Path) -> dict[str, str]:
    """Sha256 of each file, all of them on the disk when it returns."""
    files = sorted(folder.iterdir())
    with ThreadPoolExecutor(len(files)) as pool:  # flushing and hashing both wait outside the interpreter's lock
        for _ in pool.map(_fsync, files):
            pass
        return {file.name: digest for file, digest in zip(files, pool.map(sha256_of, files), strict=True)}


def _identity_of(checkpoint: Path) -> str | None:
    try:
        return str(json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["identity"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _signature(checkpoint: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of each file: changes when a file does, as far as that shows without reading it."""
    found = [(file.name, file.lstat()) for file in sorted(checkpoint.iterdir())]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())

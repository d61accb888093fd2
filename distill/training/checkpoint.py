"""Atomic checkpoints.

A checkpoint is written into a temporary folder, every file is flushed to the disk, a manifest of sha256 sums is written
last, and one rename publishes it. Only safetensors and JSON: loading runs no code. The newest two valid ones are kept,
and a start takes the newest one whose manifest holds, naming those it passes over. Several ranks may each write a share
of the files; rank 0 writes the manifest of all of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError

from distill.errors import InputError, RunError
from distill.files import fsync_folder, sha256_of, write_text
from distill.ranks import process_state
from distill.recipe.load import fingerprint
from distill.training.provenance import changed_keys, describe_changes
from distill.training.shards import OwnFile, TensorsByFile, missing, own_files, write
from distill.training.state import Numbers

KEEP = 2
MANIFEST = "MANIFEST.json"
STATE = "state.json"
HEADROOM = 2**20
"""Bytes beside the tensors: headers, JSON, the folder itself."""
SHAPING = re.compile(r"(training|fit)\.(optimizer|optimizer_params|ema|freeze|only|weights|lora)(\.|$)|mask(\.|$)")
"""Keys that decide which tensors a checkpoint holds; it cannot be continued with other values of these."""

T = TypeVar("T")


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
    micro_batch_size: int = 0
    """Examples per forward pass, before halving."""
    micro_batch_halvings: int = 0
    """Times that micro-batches were halved for want of memory."""
    evaluated: int = 0
    """Step of the last evaluation."""
    best: float | None = None
    """Best value of the metric of `keep_best` so far."""
    numbers: Numbers = field(default_factory=dict)
    """Plain numbers of the optimizer and the loss scale, when it was saved."""


class Checkpoints:
    """The published checkpoints of one training in one folder."""

    def __init__(
        self,
        folder: Path,
        made_from: Mapping[str, Any],
        say: Callable[[str], None],
        *,
        keep: int = KEEP,
        continue_changed: bool = False,
    ):
        """Read and write nothing yet.

        Args:
            folder: Holds `step-00000100` folders, also those of trainings with other inputs, which are never touched.
            made_from: Dotted keys and values of everything that the training depends on (`provenance.flatten`).
            say: Receives notices.
            keep: Number of valid checkpoints to keep.
            continue_changed: Continue from a checkpoint that was made from other inputs as well.
        """
        self.folder, self.made_from, self.say = folder, dict(made_from), say
        self.keep, self.continue_changed = keep, continue_changed

    def published(self) -> list[Path]:
        """List published checkpoints, oldest first; none of them verified."""
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []

    def newest_valid(self, steps: int | None = None) -> Path | None:
        """Find the newest intact checkpoint that this training continues from; each newer one is named.

        Args:
            steps: Length of the training; a checkpoint of a later step is passed over.

        Raises:
            InputError: `continue_changed`, and it was made from inputs that decide which tensors it holds.
        """
        for stale in self.folder.glob(".tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)  # another rank may be sweeping too
        for checkpoint in sorted(self.published(), key=lambda one: (one.stem, self._is_own(one)), reverse=True):
            reason = fault_of(checkpoint) or self._reason_not_to_continue(checkpoint, steps)
            if reason is None:
                return checkpoint
            self.say(f"checkpoint {checkpoint.name} is passed over: {reason}")
        return None

    def _is_own(self, checkpoint: Path) -> bool:
        return origin_of(checkpoint) == self.made_from

    def _reason_not_to_continue(self, checkpoint: Path, steps: int | None) -> str | None:
        """Compare what an intact checkpoint was made from; names the keys that differ."""
        origin = origin_of(checkpoint)
        if origin == self.made_from:
            return None
        differing = describe_changes(origin, self.made_from)
        if not self.continue_changed:
            return f"it was made from other inputs ({differing}); --continue-from-changed continues from it"
        for key in changed_keys(origin, self.made_from):
            if SHAPING.match(key):
                raise InputError(
                    f"checkpoint {checkpoint.name} cannot be continued with another {key} ({differing}): its tensors "
                    f"depend on it. Leave out --continue-from-changed, or put {key} back"
                )
        if steps is not None and state_of(checkpoint).step > steps:
            return f"it is after step {state_of(checkpoint).step} and this training has {steps}"
        self.say(f"checkpoint {checkpoint.name} is continued with other inputs ({differing})")
        return None

    def last_good(self) -> str:
        """Name for messages the checkpoint that the same command continues from."""
        good = [found for found in self.published() if self._is_own(found) and fault_of(found) is None]
        return f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"

    def save(self, state: TrainState, tensors: TensorsByFile) -> Path:
        """Publish `step-00000100`, then remove what is older than the newest valid ones of this training.

        Collective: each rank writes its own pieces of what is sharded, rank 0 all else. What fails on one of them is
        refused on all.

        Args:
            state: Where training stands.
            tensors: Tensors by file.

        Raises:
            RunError: Not enough space, or weights that are not finite; nothing is left of it.
        """
        final = self.folder / f"step-{state.step:08d}"
        temporary = self.folder / f".tmp-{final.name}"
        main = process_state().is_main_process
        files = own_files(tensors, process_state().process_index, process_state().num_processes)
        try:
            self._check(on_all_ranks(lambda: self._survey(temporary if main else None, files)))
            sums = on_all_ranks(lambda: write(temporary, files.values()))
            on_all_ranks(lambda: self._publish(temporary, final, state, sums) if main else None)
        except RunError as error:
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(f"{error}; {self.last_good()}") from error
        return final

    def _survey(self, temporary: Path | None, files: Mapping[str, OwnFile]) -> tuple[int, int, list[str]]:
        """Return (bytes free, bytes needed, names of weights that are not finite) on this rank.

        The rank that is given the `temporary` folder makes it, and looks at the disk.
        """
        free = 0
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            free = shutil.disk_usage(temporary).free
        need = sum(tensor.nbytes for file in files.values() for tensor in file.tensors.values())
        weights = files["model"].tensors if "model" in files else {}
        return free, need, [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]

    def _check(self, surveys: Sequence[tuple[int, int, list[str]]]) -> None:
        """Refuse to write what does not fit, or what is not worth keeping."""
        broken = sorted({name for _, _, names in surveys for name in names})
        if broken:
            raise RunError(f"weights are not finite ({', '.join(broken[:3])}): not saved")
        free, need = surveys[0][0], HEADROOM + sum(own for _, own, _ in surveys)
        if free < need:
            raise RunError(
                f"a checkpoint needs {need / 1e6:,.0f} MB and {self.folder} has {free / 1e6:,.0f} MB left: not saved. "
                f"Make space, and the same command continues from the last checkpoint"
            )

    def _publish(self, temporary: Path, final: Path, state: TrainState, sums: Sequence[Mapping[str, str]]) -> None:
        """Complete the folder with all ranks' sums, give it its name, and remove older ones than `keep` says."""
        write_text(temporary / STATE, json.dumps({"made_from": self.made_from, **asdict(state)}, indent=1))
        manifest = {STATE: sha256_of(temporary / STATE)}
        for own in sums:
            manifest |= own
        write_text(temporary / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))  # and the folder with it
        self._make_way(final)
        os.rename(temporary, final)
        fsync_folder(self.folder)
        # The best one so far is not always that of the highest step.
        mine = sorted(filter(self._is_own, self.published()), key=lambda found: found == final)
        good = [found for found in mine if fault_of(found) is None]
        for old in mine[: mine.index(good[-self.keep])] if len(good) >= self.keep else []:
            shutil.rmtree(old)

    def _make_way(self, final: Path) -> None:
        """Remove the same step of this training, which did not verify; keep that of another training beside it."""
        if not final.exists():
            return
        origin = origin_of(final)
        if origin in ({}, self.made_from):
            shutil.rmtree(final)
        else:
            os.rename(final, final.with_name(f"{final.name}.{fingerprint(origin)[:8]}"))


def fault_of(checkpoint: Path) -> str | None:
    """Verify a checkpoint, every byte of it; returns what is wrong with it, or None."""
    try:
        sums = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        found = {file.name for file in checkpoint.iterdir()} - {MANIFEST}
        if STATE not in sums or missing(sums):
            return "its manifest is incomplete"
        if found != sums.keys():
            return f"its files are not those of its manifest: {', '.join(sorted(found ^ sums.keys()))}"
        for name, expected in sums.items():
            if (checkpoint / name).is_symlink() or sha256_of(checkpoint / name) != expected:
                return f"{name} does not match its checksum"
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if absent := {"made_from", "numbers"} - state.keys():
            return f"it was written by an older version, without {', '.join(sorted(absent))}"
        return None if checkpoint.stem == f"step-{state['step']:08d}" else f"it is of step {state['step']}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"it is incomplete ({type(error).__name__}: {error})"


def state_of(checkpoint: Path) -> TrainState:
    """Read where training stood when a verified checkpoint was written."""
    fields = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    fields.pop("made_from")
    return TrainState(**fields)


def origin_of(checkpoint: Path) -> dict[str, Any]:
    """Read what a checkpoint was made from; nothing where it does not say."""
    try:
        return dict(json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["made_from"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def on_all_ranks(action: Callable[[], T]) -> list[T]:
    """Gather what `action` returns on each rank, in their order. Collective.

    Raises:
        RunError: Files cannot be written by at least one of them. It is raised on all: none waits in vain.
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    outcomes = gather_object([(result, None if failure is None else f"{failure}" or type(failure).__name__)])
    if failure is not None and not isinstance(failure, OSError | SafetensorError):
        raise failure
    said = [message for _, message in outcomes if message is not None]
    if said:
        raise RunError(f"a checkpoint cannot be written: {'; '.join(dict.fromkeys(said))}") from failure
    return [result for result, _ in outcomes]

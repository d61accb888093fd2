"""Atomic checkpoints.

A checkpoint is written into a temporary folder, every file is flushed to the disk, a manifest of sha256 sums is written
last, and one rename publishes it. Only safetensors and JSON: loading runs no code. The newest two valid ones are kept,
and a start takes the newest one whose manifest holds, naming those it passes over. Several ranks may each write a share
of the files; rank 0 writes the manifest of all of them. When and by which thread: `training/writer.py`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.files import flush, read_json, sha256_of, write_text
from distill.models.head import HeadPrecision
from distill.recipe.load import fingerprint
from distill.training.provenance import changed_keys, describe_changes
from distill.training.shards import missing
from distill.training.state import Numbers

KEEP = 2
MANIFEST = "MANIFEST.json"
STATE = "state.json"
SHAPING = re.compile(r"(training|fit)\.(optimizer|optimizer_params|ema|freeze|only|weights|lora)(\.|$)|mask(\.|$)")
"""Keys that decide which tensors a checkpoint holds; it cannot be continued with other values of these."""


@dataclass
class TrainState:
    """Everything that survives a restart besides tensors.

    Sample order, learning rate and random numbers are functions of the step, so the step is nearly all there is.
    """

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens seen, padding not counted."""
    micro_batch_size: int = 0
    """Examples per forward pass, before halving."""
    micro_batch_halvings: int = 0
    """Times that micro-batches were halved for want of memory."""
    evaluated: int = 0
    """Step of the last evaluation."""
    best: float | None = None
    """Best value of the metric of `keep_best` so far."""
    head_precision: HeadPrecision | None = None
    """Precision of the output head's operands, where it follows the training."""
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
        self.discard_drafts()
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

    def draft(self, step: int) -> Path:
        """Name the folder that a checkpoint is written into before it is published."""
        return self.folder / f".tmp-{_name(step)}"

    def make_draft(self, step: int) -> int:
        """Make that folder, empty and the only one of its kind; returns the bytes that are free on its disk."""
        self.discard_drafts()
        self.draft(step).mkdir(parents=True)
        return shutil.disk_usage(self.draft(step)).free

    def discard_drafts(self) -> None:
        """Remove what was never published."""
        for draft in self.folder.glob(".tmp-*"):
            shutil.rmtree(draft, ignore_errors=True)  # another rank may be sweeping too

    def publish(self, state: TrainState, sums: Mapping[str, str]) -> None:
        """Complete a draft, give it its name, then remove what is older than the newest valid ones of this training.

        Args:
            state: Where training stood.
            sums: The sha256 of each of its files, by name.
        """
        draft, final = self.draft(state.step), self.folder / _name(state.step)
        write_text(draft / STATE, json.dumps({"made_from": self.made_from, **asdict(state)}, indent=1))
        manifest = {STATE: sha256_of(draft / STATE), **sums}
        write_text(draft / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))  # and the folder with it
        self._make_way(final)
        os.rename(draft, final)
        flush(self.folder)
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


def _name(step: int) -> str:
    return f"step-{step:08d}"


def fault_of(checkpoint: Path) -> str | None:
    """Verify a checkpoint, every byte of it; returns what is wrong with it, or None."""
    try:
        sums = read_json(checkpoint / MANIFEST)
        found = {file.name for file in checkpoint.iterdir()} - {MANIFEST}
        if STATE not in sums or missing(sums):
            return "its manifest is incomplete"
        if found != sums.keys():
            return f"its files are not those of its manifest: {', '.join(sorted(found ^ sums.keys()))}"
        for name, expected in sums.items():
            if (checkpoint / name).is_symlink() or sha256_of(checkpoint / name) != expected:
                return f"{name} does not match its checksum"
        state = read_json(checkpoint / STATE)
        if absent := {"made_from", "numbers"} - state.keys():
            return f"it was written by an older version, without {', '.join(sorted(absent))}"
        whole = TrainState(**{key: value for key, value in state.items() if key != "made_from"})
        counts = [whole.step, whole.tokens, whole.micro_batch_size, whole.evaluated]
        if not (all(type(each) is int and each >= 0 for each in counts) and whole.micro_batch_halvings in range(64)):
            return "its counts are those of no training"
        if not isinstance(whole.numbers, dict):
            return "its state is that of no training"
        return None if checkpoint.stem == _name(state["step"]) else f"it is of step {state['step']}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"it is incomplete ({type(error).__name__}: {error})"


def state_of(checkpoint: Path) -> TrainState:
    """Read where training stood when a verified checkpoint was written."""
    fields = read_json(checkpoint / STATE)
    fields.pop("made_from")
    return TrainState(**fields)


def origin_of(checkpoint: Path) -> dict[str, Any]:
    """Read what a checkpoint was made from; nothing where it does not say."""
    try:
        return dict(read_json(checkpoint / STATE)["made_from"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}

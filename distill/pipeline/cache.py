"""Stage `cache`: run the teacher once over all that the student will be trained on, and keep what the loss reads."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from distill.errors import InputError, RunError
from distill.evaluation.arms import terms_of, trained_arms
from distill.files import cache_folder, write_json
from distill.losses.chunked import HeadInput, chunks
from distill.models.forward import Batch, Capture, Outputs, to_device
from distill.models.head import OutputHead, output_head
from distill.models.load import load_config
from distill.models.precision import DTYPES
from distill.models.topk import TopK
from distill.pipeline.cached_columns import FOLDER, columns_of, lost_parts, real_rows
from distill.pipeline.cached_inputs import Entries, find_entries, inputs_of_training
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage, with_version
from distill.pipeline.teachers import load_teaching
from distill.pipeline.train import objective_of
from distill.pipeline.train_checks import is_taught
from distill.pipeline.trainings import hollow
from distill.ranks import process_state
from distill.recipe.load import fingerprint
from distill.release.wording import format_count, format_seconds, format_size
from distill.teacher import LiveTeacher, Mixture
from distill.teacher.cache import ENTRIES, HEAD, Column, shard_name, write_head
from distill.teacher.shards import ShardFolder
from distill.teacher.topk import bytes_per_token, pack

SAID_EVERY = 60.0
"""Seconds between two lines about how far it is."""


def work(session: Session) -> None:
    """Fill the cache, shared out over the ranks, and note what is in it."""
    state, columns = process_state(), wanted_columns(session)
    entries = find_entries(session, columns)
    kind, vocabulary = session.corpus.head, session.vocabulary
    made_from = {
        "teacher": session.teaching_inputs(),
        "kind": kind,
        "vocabulary": vocabulary,
        "entries": entries.digest,
    }
    folder = ShardFolder(cache_folder(FOLDER) / fingerprint(with_version(made_from)))
    own = Filling(session, folder, entries, columns)
    own.say_what_is_there()
    own.fill()
    if state.is_main_process:
        files = [*own.extra, *(shard_name(column, shard) for column in columns for shard in range(entries.shards))]
        write_json(session.folder.cached, {"cache": folder.root.name, "files": files, "rows": len(entries.keys)})


def wanted_columns(session: Session) -> list[Column]:
    """List what the trainings of a recipe read of the teacher."""
    terms = {arm: terms_of(session.recipe, arm) for arm in trained_arms(session.recipe)}
    taught = [columns_of(session, own, objective_of(session, arm)) for arm, own in terms.items() if is_taught(own)]
    return list({column.name: column for own in taught for column in own}.values())


def bytes_of(session: Session, column: Column, positions: int) -> int:
    """Count the bytes of a column."""
    if column.field == "topk":
        return positions * bytes_per_token(column.k, session.vocabulary or 0)
    config, head = load_config(session.teacher, session.head, session.remote_code), session.corpus.head
    width = config.hidden_size
    if column.field == "logits" and not session.kind.vectors:
        width = 2 if head == "span" else 1 if head == "regression" else config.num_labels
    return positions * int(width) * DTYPES[column.dtype].itemsize


def sizes_of(session: Session, columns: Sequence[Column], positions: Mapping[str, int]) -> dict[str, int]:
    """Count the bytes of each column, by its positions, and of the output head where it is kept."""
    sizes = {column.name: bytes_of(session, column, positions[column.name]) for column in columns}
    if any(column.field == "last" for column in columns):
        model = hollow(session, session.teacher, session.head)
        kept, dtype = output_head(model), DTYPES.get(session.recipe.teacher.dtype, model.dtype)
        tensors = [] if kept is None else [kept.weight] if kept.bias is None else [kept.weight, kept.bias]
        sizes[HEAD] = sum(tensor.numel() for tensor in tensors) * dtype.itemsize
    return sizes


@dataclass
class Filling:
    """A cache that is being filled by this rank, beside others and other runs."""

    session: Session
    folder: ShardFolder
    entries: Entries
    columns: Sequence[Column]

    def __post_init__(self) -> None:
        self.state = process_state()
        self.started, self.said, self.done = time.monotonic(), time.monotonic(), 0

    @property
    def extra(self) -> list[str]:
        """Files beside the columns and the index."""
        return [HEAD] if any(column.field == "last" for column in self.columns) else []

    @cached_property
    def teacher(self) -> LiveTeacher | Mixture:
        """What teaches, loaded where something is missing."""
        captured = [(column.field, column.layer) for column in self.columns if column.layer is not None]
        layers = {
            name: sorted(layer for field, layer in captured if field == name) for name in ("hidden", "encoder_hidden")
        }
        return load_teaching(self.session, Capture(**layers, stop_at_head=self.session.kind.vocabulary))

    @cached_property
    def head(self) -> OutputHead:
        """The output head. Raises InputError where its form is not known."""
        head = output_head(self.teacher.model)
        if head is None:
            raise InputError(
                f"{self.session.teacher_key}.cache.keep: hidden states are of no use without the output head, and that "
                f"of a {type(self.teacher.model).__name__} has a form that is not known; write keep: topk"
            )
        return head

    def say_what_is_there(self) -> None:
        """Say how large the cache is and what is missing of it, and refuse a disk that is too small."""
        say, entries = self.session.say, self.entries
        sizes = sizes_of(self.session, self.columns, entries.positions)
        have = {name for group in ("", *(column.name for column in self.columns)) for name in self.folder.names(group)}
        share = {c.name: sum(shard_name(c, n) not in have for n in range(entries.shards)) for c in self.columns}
        missing = sum(sizes[name] * count // entries.shards for name, count in share.items())
        missing += sizes.get(HEAD, 0) if HEAD not in have else 0
        say(
            f"  {format_count(len(entries.examples))} inputs, {format_count(entries.tokens)} tokens: "
            f"{', '.join(f'{name} {format_size(size)}' for name, size in sizes.items())}, in {self.folder.root}"
        )
        if not missing:
            say("  all of it is there, from an earlier run; the teacher is not loaded")
        elif have:
            say(f"  {format_size(missing)} of it is missing")
        free = shutil.disk_usage(cache_folder(FOLDER)).free
        if missing > free:
            raise InputError(
                f"{self.session.teacher_key}.cache needs {format_size(missing)} more, and {cache_folder(FOLDER)} has "
                f"{format_size(free)} free; set DISTILL_CACHE to a folder with more, or write keep: topk, a lower k or "
                f"layers: none"
            )

    def fill(self) -> None:
        """Write the missing shards: this rank's own first, then those that no other process is writing.

        The main rank looks whether the files that are there are whole, as it can say it, and others at their own.
        """
        state, say = self.state, self.session.say
        if state.is_local_main_process:
            self._write_index()
        left = sorted(range(self.entries.shards), key=lambda shard: (shard - state.process_index) % state.num_processes)
        for wait in (False, True):
            busy = []
            for shard in left:
                own = state.is_main_process or shard % state.num_processes == state.process_index
                with self.folder.locked(shard, wait=wait) as held:
                    if held:
                        self._make(shard, say if own else None)
                    else:
                        busy.append(shard)
            left = busy
            if left:
                say(f"  {len(left)} shards are being filled by other processes; waiting for them")

    def _write_index(self) -> None:
        with self.folder.locked(self.entries.shards, wait=True):
            if not self.folder.whole(ENTRIES, self.session.say):
                self.folder.write(ENTRIES, self.entries.tensors())
            if self.extra and not self.folder.whole(HEAD, self.session.say):
                write_head(self.folder, self.head)

    def _make(self, shard: int, say: Callable[[str], None] | None) -> None:
        columns = [column for column in self.columns if not self.folder.whole(shard_name(column, shard), say)]
        if not columns:
            return
        parts = [self._run(columns, batch) for batch in self.entries.batches(self.session, shard)]
        for number, column in enumerate(columns):
            counts, values = zip(*(part[number] for part in parts), strict=True)
            starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(counts).cumsum(0)])
            self.folder.write(shard_name(column, shard), {"starts": starts, "values": torch.cat(values)})
        self._say_progress()

    def _run(self, columns: Sequence[Column], batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Run the teacher; give per column the positions of each real row [B], and what is kept of all [N, ...]."""
        own, real = to_device(batch, self.teacher.device), real_rows(batch)
        try:
            outputs, found = self.teacher(own), []
        except torch.OutOfMemoryError as error:
            size = self.session.recipe.evaluation.batch_size
            raise RunError(
                f"the teacher's pass is out of memory with evaluation.batch_size: {size}; lower it"
            ) from error
        for column in columns:
            mask = column.positions(own)
            values = self._likeliest(column, outputs, mask) if column.field == "topk" else column.select(outputs, mask)
            found.append((mask.sum(1).cpu()[real], values.cpu()))
        return found

    def _likeliest(self, column: Column, outputs: Outputs, mask: Tensor) -> Tensor:
        vocabulary = self.session.vocabulary or 0
        logits, head = outputs.logits, outputs.head
        side: Any = HeadInput(outputs.last[mask], head) if outputs.last is not None and head else logits[mask]  # type: ignore[index]
        none = torch.zeros(0, bytes_per_token(column.k, vocabulary), dtype=torch.uint8, device=mask.device)
        tokens = (TopK.of(logits[:, :vocabulary], column.k) for _, (logits,) in chunks([side]))
        return torch.cat([none, *(pack(each, vocabulary) for each in tokens)])

    def _say_progress(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.said >= SAID_EVERY:
            self.said = now
            own = -(-self.entries.shards // self.state.num_processes)
            left = format_seconds(max(0, own - self.done) * (now - self.started) / self.done)
            self.session.say(f"  {self.done} of about {own} shards of this process, {left} left")


def check_data(session: Session) -> None:
    """Refuse to keep the likeliest tokens where there are none, or fewer. Raises InputError."""
    spec = session.recipe.teacher.cache
    assert spec is not None, "the stage is not wanted without `teacher.cache`"
    if spec.keep == "topk":
        if session.vocabulary is None:
            key = f"{session.teacher_key}.cache.keep"
            raise InputError(f"{key}: a {session.corpus.head} head has no tokens; write keep: hidden")
        bytes_per_token(spec.k, session.vocabulary)


def inputs(session: Session) -> dict[str, Any]:
    """List the teacher, the data, what is kept, and which examples the training will see."""
    return {
        "teacher": session.teaching_inputs(),
        "data": session.corpus.fingerprint,
        "kept": sorted(column.name for column in wanted_columns(session)),
        "seen": inputs_of_training(session).described,
    }


STAGE = Stage(
    "cache",
    work,
    inputs,
    lambda session: [session.folder.cached],
    wanted=lambda recipe: recipe.teacher.cache is not None,
    together=True,
    check_data=check_data,
    lost=lost_parts,
)

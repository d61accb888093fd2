"""The inputs that a training will read, each once, and their shards: a pure function of what they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data import collate
from distill.data.batches import step_indices
from distill.evaluation.arms import terms_of, trained_arms, tries_of
from distill.models.forward import Batch
from distill.models.padding import mark_padding
from distill.pipeline.cached_columns import keys_of, real_rows
from distill.pipeline.session import Session
from distill.pipeline.train import batches_for, spec_of
from distill.pipeline.train_checks import is_taught
from distill.teacher.cache import Column
from distill.teacher.keys import KEY

READ_AT_ONCE = 256
"""Examples whose keys are made at a time."""
LEAST, MOST, SHARDS, MOST_SHARDS = 512, 2**15, 64, 2**13
"""Tokens of a shard: as many as make SHARDS of them, within LEAST and MOST; more where there would be MOST_SHARDS."""


@dataclass(frozen=True)
class Seen:
    """The examples that a training reads, as (step, example) pairs."""

    pairs: np.ndarray
    """int64 [n, 2]; the step is 0 where it does not matter."""
    described: Any
    """The same in short, for fingerprints."""


def inputs_of_training(session: Session) -> Seen:
    """List the examples that the longest taught training sees, with their steps where these decide what is drawn."""
    recipe = session.recipe
    taught = [arm for arm in trained_arms(recipe) if is_taught(terms_of(recipe, arm))]
    steps = max(spec_of(session, arm, own).steps or 0 for arm in taught for own in tries_of(recipe, arm))
    batches = batches_for(session, recipe.training, labelled=False)
    size, count = batches.batch_size, len(batches.pool)
    draws = session.bound_task.draws
    if not draws and steps * size >= count:
        return Seen(np.stack([np.zeros(count, np.int64), np.arange(count)], 1), "all")
    chosen = [step_indices(batches.pool, size, recipe.seed, step) for step in range(steps)]
    pairs = [(step if draws else 0, index) for step, own in enumerate(chosen) for index in own]
    return Seen(np.array(pairs), {"seed": recipe.seed, "batch_size": size, "steps": steps})


@dataclass(frozen=True)
class Entries:
    """Inputs in the order in which they are kept: the longest first, so that batches have little padding."""

    examples: np.ndarray
    """int64 [E, 2], step and example."""
    keys: np.ndarray
    """uint8 [R, KEY] of the rows: an example has one or several."""
    examples_of: np.ndarray
    """int64 [S + 1] first example of each shard."""
    rows_of: np.ndarray
    """int64 [S + 1] first row of each shard."""
    positions: dict[str, int]
    """Column -> positions that are kept of it."""
    tokens: int

    @property
    def shards(self) -> int:
        """Number of shards."""
        return len(self.rows_of) - 1

    @property
    def digest(self) -> str:
        """Hash the keys and their shards."""
        return hashlib.sha256(self.keys.tobytes() + self.rows_of.tobytes()).hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Give the index of the cache."""
        return {"keys": torch.from_numpy(self.keys), "bounds": torch.from_numpy(self.rows_of)}

    def batches(self, session: Session, shard: int) -> Iterator[Batch]:
        """Make the batches of a shard, its rows in their order."""
        own = self.examples[self.examples_of[shard] : self.examples_of[shard + 1]]
        size = session.recipe.evaluation.batch_size
        for start in range(0, len(own), size):
            yield _batch_of(session, own[start : start + size])


def find_entries(session: Session, columns: Sequence[Column], every: int = 1) -> Entries:
    """Hash the inputs that a training will read, each distinct one once; `every` n: of each n-th example only."""
    pairs, kind = inputs_of_training(session).pairs[::every], session.corpus.head
    found: dict[bytes, np.ndarray] = {}
    positions = dict.fromkeys((column.name for column in columns), 0)
    for start in range(0, len(pairs), READ_AT_ONCE):
        part = pairs[start : start + READ_AT_ONCE]
        batch = _batch_of(session, part)
        real = real_rows(batch).numpy()
        rows = real.reshape(len(part), -1).sum(1)
        new = []
        for pair, own in zip(part, np.split(keys_of(kind, batch)[real], np.cumsum(rows)[:-1]), strict=True):
            new.append(own.tobytes() not in found)
            found.setdefault(own.tobytes(), pair)
        for column in columns:
            kept = column.positions(batch).numpy().reshape(len(part), -1).sum(1)
            positions[column.name] += int(kept[new].sum())
    lengths = session.corpus.train.lengths
    names = sorted(found, key=lambda name: (-lengths[found[name][1]], name))
    examples = np.array([found[name] for name in names])
    ends = np.cumsum(lengths[examples[:, 1]])
    starts = np.flatnonzero(np.diff((ends - 1) // _shard_size(int(ends[-1])), prepend=-1))
    examples_of = np.append(starts, len(names))
    counts = np.cumsum([0, *(len(name) // KEY for name in names)])
    keys = np.frombuffer(b"".join(names), np.uint8).reshape(-1, KEY).copy()
    return Entries(examples, keys, examples_of, counts[examples_of], positions, int(ends[-1]))


def _shard_size(tokens: int) -> int:
    return max(min(max(LEAST, tokens // SHARDS), MOST), tokens // MOST_SHARDS)


def _batch_of(session: Session, pairs: np.ndarray) -> Batch:
    corpus, seed = session.corpus, session.recipe.seed
    seeds = [(seed, int(step), int(index)) for step, index in pairs]
    return mark_padding(collate(corpus, corpus.train, [int(index) for _, index in pairs], seeds))

"""The examples of each step, and their tensors.

The order is a pure function of (seed, step): nothing about it has to be saved, a resumed run continues exactly, and it
does not depend on how many processes share the work.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from distill.data.corpus import Corpus, Examples
from distill.data.tasks.task import Seeds
from distill.models.forward import Batch, Outputs

WORKER_TIMEOUT = 45
"""Seconds after which a loader worker that gives no batch is taken for dead."""


def step_indices(pool: Sequence[int], batch_size: int, seed: int, step: int) -> list[int]:
    """Choose the examples of one optimizer step (0 is the first).

    Examples stream through endless epochs, each a fresh permutation of `pool`; every step takes the next `batch_size`,
    so all steps are full and each epoch visits every example exactly once.
    """
    first = step * batch_size
    positions = range(first, first + batch_size)
    size = len(pool)
    return [pool[_permutation(seed, position // size, size)[position % size]] for position in positions]


@lru_cache(maxsize=2)  # a step touches one epoch, or two where it crosses over
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def micro_batches(indices: Sequence[int], lengths: np.ndarray, size: int) -> list[list[int]]:
    """Split one step's examples into forward passes of `size`, like lengths together, so that little is padding.

    The split does not change the loss, which is normalised over the whole step.
    """
    ordered = sorted(indices, key=lambda index: (-lengths[index], index))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def collate(corpus: Corpus, examples: Examples, indices: Sequence[int], seeds: Seeds | None = None) -> Batch:
    """Make a batch of some examples, as their task does it; without `seeds` always the same one."""
    given = {**examples.take(indices), **corpus.constants}
    return corpus.task.collate(given, corpus.padding, seeds or [(int(index),) for index in indices])


@dataclass(frozen=True)
class TrainingBatches:
    """The micro-batches of every step, dealt out to ranks."""

    corpus: Corpus
    pool: Sequence[int]
    """Training examples in use: all, or the labelled ones."""
    batch_size: int
    micro_batch_size: int
    seed: int

    def micro_batches_per_step(self) -> int:
        """Count the forward passes per optimizer step over all ranks."""
        return -(-self.batch_size // self.micro_batch_size)

    def steps_for(self, epochs: float) -> int:
        """Count the optimizer steps in so many passes over the pool, rounded up."""
        return max(1, int(np.ceil(epochs * len(self.pool) / self.batch_size - 1e-9)))

    def steps_for_tokens(self, tokens: int) -> int:
        """Count the optimizer steps until so many tokens have been seen, padding not counted."""
        lengths = self.corpus.train.lengths[list(self.pool)]
        epochs, rest = divmod(tokens, int(lengths.sum()))
        seen = np.cumsum(lengths[_permutation(self.seed, epochs, len(lengths))])
        examples = epochs * len(lengths) + (int(np.searchsorted(seen, rest)) + 1 if rest else 0)
        return max(1, -(-examples // self.batch_size))

    def epoch_at(self, step: int) -> float:
        """Count the passes over the pool done after `step` steps."""
        return step * self.batch_size / len(self.pool)

    def stream(
        self, start: int, stop: int, rank: int, world: int, workers: int = 0
    ) -> Iterator[list[tuple[int, Batch]]]:
        """Yield, for each step in [start, stop), this rank's micro-batches, each with its number within the step.

        Args:
            start: First step.
            stop: One more than the last.
            rank: This process's number.
            world: How many processes share a step.
            workers: Processes that prepare batches; 0: this one does.
        """
        numbers = range(rank, self.micro_batches_per_step(), world)
        loader: DataLoader[Batch] = DataLoader(
            _TrainingSet(self.corpus, self.seed),  # type: ignore[arg-type]
            batch_sampler=self._indices(start, stop, numbers),
            collate_fn=_identity,
            num_workers=workers,
            timeout=WORKER_TIMEOUT if workers else 0,
            worker_init_fn=_ignore_signals if workers else None,
        )
        batches = iter(loader)
        for _ in range(start, stop):
            yield [(number, next(batches)) for number in numbers]

    def _indices(self, start: int, stop: int, numbers: range) -> Iterator[list[tuple[int, int]]]:
        for step in range(start, stop):
            chosen = step_indices(self.pool, self.batch_size, self.seed, step)
            groups = micro_batches(chosen, self.corpus.train.lengths, self.micro_batch_size)
            yield from ([(step, index) for index in groups[number]] for number in numbers)


def _identity(batch: Any) -> Any:
    return batch


def _ignore_signals(_worker: int) -> None:
    # They come to the whole group of processes; a worker that ends before the step would take training with it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class _TrainingSet:
    """Map-style view for DataLoader; `__getitems__` gets a whole batch of steps and indices at once."""

    corpus: Corpus
    seed: int

    def __len__(self) -> int:
        return len(self.corpus.train)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        seeds = [(self.seed, step, index) for step, index in keys]
        return collate(self.corpus, self.corpus.train, [index for _, index in keys], seeds)


def evaluation_batches(
    corpus: Corpus,
    examples: Examples,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    pool: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Batch every example of the pool (None: of the split) once over all ranks; `examples` [B] numbers them."""
    groups = micro_batches(range(len(examples)) if pool is None else pool, examples.lengths, batch_size)
    for indices in groups[rank::world]:
        yield collate(corpus, examples, indices) | {"examples": torch.tensor(indices)}


def observe_batch(corpus: Corpus, examples: Examples, model: Any, outputs: Outputs, batch: Batch) -> dict[str, Any]:
    """Return the columns that the task observes for a batch of `evaluation_batches`."""
    return corpus.task.observe(model, outputs, batch, examples.take(batch["examples"].tolist()))

"""The examples of each step, and their tensors.

The order is a pure function of (seed, step): nothing about it has to be saved, a resumed run continues exactly, and it
does not depend on how many processes share the work.
"""

from __future__ import annotations

import atexit
import math
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader

from distill.data.corpus import Corpus, Examples
from distill.data.tasks.task import Ragged, Seeds, fitting_size
from distill.errors import InputError
from distill.models.forward import Batch, Outputs
from distill.models.padding import mark_padding

WORKER_TIMEOUT = 45
"""Seconds after which a loader worker that gives no batch is taken for dead."""
AHEAD = 2
"""Steps whose batches are ready before a GPU asks for them."""
T = TypeVar("T")


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


def padded_sizes(longest: int) -> tuple[int, ...]:
    """List up to 16 lengths, multiples of 8 and `longest`: what rows are padded to where each other length costs."""
    step = 8 * math.ceil(longest / 128)
    return (*range(step, longest, step), longest)


def collate(
    corpus: Corpus,
    examples: Examples,
    indices: Sequence[int],
    seeds: Seeds | None = None,
    sizes: tuple[int, ...] = (),
) -> Batch:
    """Make a batch of some examples, as their task does it.

    Args:
        corpus: Knows the task.
        examples: Of one of its splits.
        indices: Which ones.
        seeds: Of each example, for what is drawn at random; None: always the same.
        sizes: Lengths that rows are padded to; (): the longest of them.
    """
    taken = examples.take(indices)
    if sizes:
        taken = {name: replace(own, sizes=sizes) if isinstance(own, Ragged) else own for name, own in taken.items()}
    given = {**taken, **corpus.constants}
    batch = corpus.task.collate(given, corpus.padding, seeds or [(int(index),) for index in indices])
    return batch | {"route": torch.from_numpy(taken["route"])} if "route" in taken else batch


@dataclass(frozen=True)
class TrainingBatches:
    """The micro-batches of every step, dealt out to ranks."""

    corpus: Corpus
    pool: Sequence[int]
    """Training examples in use: all, or the labelled ones."""
    batch_size: int
    micro_batch_size: int
    seed: int
    max_length: int | None = None
    """Tokens that a text may have; None: those of the longest example."""
    sizes: tuple[int, ...] = ()
    """Lengths that rows are padded to; (): each micro-batch to the longest of its own."""
    extend: Callable[[Batch], Batch] | None = None
    """Adds to each micro-batch, where it is made, what a cached teacher has for it."""

    def in_sizes(self) -> TrainingBatches:
        """Pad rows to a few lengths only, since whatever is compiled is compiled for each."""
        longest = int(self.corpus.train.lengths.max())
        return replace(self, sizes=padded_sizes(min(longest, self.max_length or longest)))

    def padding_added(self, steps: int) -> float:
        """Compute the share of positions that `sizes` add to those of as many steps from the first on."""
        plain = padded = 0
        for _, groups in self._groups(0, steps):
            for group in groups:
                longest = int(self.corpus.train.lengths[group].max())
                plain += len(group) * longest
                padded += len(group) * fitting_size(longest, self.sizes)
        return padded / plain - 1

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
        self,
        start: int,
        stop: int,
        rank: int,
        world: int,
        workers: int = 0,
        device: torch.device | None = None,
    ) -> Iterator[list[tuple[int, Batch]]]:
        """Yield, for each step in [start, stop), this rank's micro-batches, each with its number within the step.

        Args:
            start: First step.
            stop: One more than the last.
            rank: This process's number.
            world: How many processes share a step.
            workers: Processes that prepare batches; 0: this one does.
            device: Where they go. For a GPU a thread has them ready in pinned memory, from which copies go on behind
                the host's back; the batches are the same.
        """
        numbers = range(rank, self.micro_batches_per_step(), world)
        loader: DataLoader[Batch | InputError] = DataLoader(
            self,  # type: ignore[arg-type]
            batch_sampler=self._indices(start, stop, numbers),
            collate_fn=_identity,
            num_workers=workers,
            timeout=WORKER_TIMEOUT if workers else 0,
            worker_init_fn=_ignore_signals if workers else None,
        )
        batches = iter(loader)  # here and not in the thread: torch tells only the main one that a worker died
        steps = ([(number, _given(next(batches))) for number in numbers] for _ in range(start, stop))
        try:
            if device is None or device.type != "cuda":
                yield from steps
            else:
                # A new thread would pin its memory through the first GPU, whichever this process has.
                yield from ahead(steps, _pinned, partial(torch.cuda.set_device, torch.cuda.current_device()))
        finally:
            del batches  # ends the workers, also while somebody keeps the traceback of an error

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch | InputError:
        """Make the micro-batch of some (step, example), for the loader; an error is raised where it arrives."""
        seeds = [(self.seed, step, index) for step, index in keys]
        indices = [index for _, index in keys]
        batch = mark_padding(collate(self.corpus, self.corpus.train, indices, seeds, self.sizes))
        try:
            return batch if self.extend is None else self.extend(batch)
        except InputError as error:
            return error  # raised in a worker, its message would be a traceback

    def _groups(self, start: int, stop: int) -> Iterator[tuple[int, list[list[int]]]]:
        """Yield each step with the examples of its micro-batches."""
        for step in range(start, stop):
            chosen = step_indices(self.pool, self.batch_size, self.seed, step)
            yield step, micro_batches(chosen, self.corpus.train.lengths, self.micro_batch_size)

    def _indices(self, start: int, stop: int, numbers: range) -> Iterator[list[tuple[int, int]]]:
        for step, groups in self._groups(start, stop):
            yield from ([(step, index) for index in groups[number]] for number in numbers)


def ahead(items: Iterator[T], prepare: Callable[[T], T], begin: Callable[[], object] = lambda: None) -> Iterator[T]:
    """Yield items that a thread takes and prepares, `AHEAD` of them before they are asked for.

    What it raises comes up here, in its turn.

    Args:
        items: Taken by the thread alone.
        prepare: Called in the thread with each.
        begin: Called in the thread before all else.
    """

    def take() -> T | None:
        return next((prepare(item) for item in items), None)

    with ThreadPoolExecutor(1, initializer=begin) as thread:
        coming = deque(thread.submit(take) for _ in range(AHEAD))
        while (item := coming.popleft().result()) is not None:
            coming.append(thread.submit(take))
            yield item


def _pinned(step: list[tuple[int, Batch]]) -> list[tuple[int, Batch]]:
    return [(number, {name: tensor.pin_memory() for name, tensor in batch.items()}) for number, batch in step]


def _identity(batch: Any) -> Any:
    return batch


def _given(found: Batch | InputError) -> Batch:
    """Return what a worker made, or raise here what it could not do."""
    if isinstance(found, InputError):
        raise found
    return found


def _ignore_signals(_worker: int) -> None:
    # They come to the whole group of processes; a worker that ends before the step would take training with it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _kill_workers() -> None:
    """End the workers of a process that fails: it asks them with SIGTERM, which they ignore, and waits for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take their end for a failure
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


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

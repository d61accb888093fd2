"""Micro-batches of answers that the student itself writes, in the place of those of the data.

Generalized Knowledge Distillation (Agarwal et al. 2023, arXiv:2306.13649, algorithm 1), a coin for each micro-batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from distill.models.forward import UNLABELLED, Batch, with_decoder_inputs
from distill.models.generate import Writing
from distill.models.padding import mark_padding
from distill.models.precision import autocast_for

COIN, TEXT = 0, 1
"""What is drawn, as the last of the numbers that its seed follows from."""
FIGURES = ("micro_batches", "written", "answers", "tokens", "ended", "short", "left_out")
"""Micro-batches, those whose answers the student wrote, these answers, their tokens, answers that ended by themselves,
that had less room than `max_new_tokens`, and answers of the data in these that have no prompt to write for."""


def seed_of(*numbers: int) -> int:
    """Derive a seed from whole numbers: the same on whichever rank computes it, and after any restart."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@dataclass
class OnPolicy:
    """Lets the student write, as `training.on_policy` says."""

    share: float
    precision: str
    """Of the training."""
    seed: int
    prompts: Callable[[Batch], Sequence[Tensor | None]]
    """Token ids [L] that each answer of a batch, on the host, is written for; None: nothing stands before it."""
    writing: Writing
    with_answers: Callable[..., Batch]
    """(prompts, answers, sizes=…) -> a batch as those of the data are, whose labels are the answers."""
    sizes: tuple[int, ...] = ()
    """Lengths that rows are padded to; (): to the longest of a micro-batch."""
    figures: Counter[str] = field(default_factory=Counter)
    """`FIGURES` since the last record, of this rank."""
    seconds: float = 0.0
    """That writing took since the last record."""

    def chosen(self, step: int, number: int) -> bool:
        """Toss the coin of a micro-batch: does the student write its answers?"""
        return seed_of(self.seed, step, number, 0, COIN) < self.share * 2**32

    def __call__(
        self, student: Any, numbered: Sequence[tuple[int, Batch]], step: int, pieces: int
    ) -> list[tuple[int, Batch]]:
        """Replace the answers of some micro-batches of a step by those of the student, which is left in eval mode.

        Args:
            student: The plain model, whole on this device.
            numbered: This rank's micro-batches, each with its number within the step.
            step: The first is 0.
            pieces: How many calls the prompts of a micro-batch are shared out to, for the memory.
        """
        devices = [student.device] if student.device.type == "cuda" else []
        found = Counter[str](micro_batches=len(numbered))
        with torch.random.fork_rng(devices), autocast_for(student.eval(), self.precision):
            written = [
                (number, self._answer(student, batch, (step, number), pieces, found)) for number, batch in numbered
            ]
        self.figures += found
        return written

    def _answer(self, student: Any, batch: Batch, place: tuple[int, int], pieces: int, found: Counter[str]) -> Batch:
        """Return a micro-batch, with answers of the student where its coin says so, and count what happened."""
        given = self.prompts(batch) if self.chosen(*place) else []
        prompts = [prompt for prompt in given if prompt is not None]
        if not prompts:
            return batch
        answers: list[Tensor] = []
        size = -(-len(prompts) // pieces)
        for piece, start in enumerate(range(0, len(prompts), size)):
            torch.manual_seed(seed_of(self.seed, *place, piece, TEXT))
            answers += self.writing(student, prompts[start : start + size])
        found.update(
            written=1,
            answers=len(answers),
            tokens=sum(map(len, answers)),
            ended=sum(int(answer[-1]) in self.writing.ends for answer in answers),
            short=sum(self.writing.room(prompt) < self.writing.max_new_tokens for prompt in prompts),
            left_out=len(given) - len(prompts),
        )
        return unlabelled(with_decoder_inputs(student, self.with_answers(prompts, answers, sizes=self.sizes)))

    def read(self, accelerator: Accelerator) -> dict[str, float | int | None]:
        """Take out what was written since the last record, over all ranks, and the seconds of this one. Collective."""
        own = torch.tensor([self.figures[name] for name in FIGURES], device=accelerator.device)
        found = dict(zip(FIGURES, accelerator.reduce(own, "sum").tolist(), strict=True))
        micro, written, answers = (found.pop(name) for name in FIGURES[:3])
        means = {
            f"{name}_share": round(found.pop(name) / answers, 4) if answers else None for name in ("ended", "short")
        }
        length = round(found["tokens"] / answers, 2) if answers else None
        seconds, self.seconds, self.figures = round(self.seconds, 3), 0.0, Counter()
        share = {"share": written / micro if micro else None, "answers": answers, "mean_tokens": length}
        return {**share, **found, **means, "seconds": seconds}


def unlabelled(batch: Batch) -> Batch:
    """Take the labels of what a student wrote: the teacher is compared there, and nothing says that it is right."""
    labels = batch["labels"]
    return mark_padding({**batch, "written": labels != UNLABELLED, "labels": torch.full_like(labels, UNLABELLED)})

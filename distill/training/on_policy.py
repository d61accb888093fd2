"""Micro-batches of answers that the student itself writes, in the place of those of the data.

Generalized Knowledge Distillation (Agarwal et al. 2023, arXiv:2306.13649, algorithm 1), a coin for each micro-batch.
"""

from __future__ import annotations

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
from distill.recipe.schema import Training

COIN, TEXT = 0, 1
"""What is drawn, as the last of the numbers that its seed follows from."""
FIGURES = ("micro_batches", "written", "answers", "tokens", "ended", "short")


def seed_of(*numbers: int) -> int:
    """Derive a seed from whole numbers: the same on whichever rank computes it, and after any restart."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@dataclass
class OnPolicy:
    """Lets the student write, as `training.on_policy` says."""

    spec: Training
    seed: int
    prompts: Callable[[Batch], Sequence[Tensor | None]]
    """Token ids [L] that each answer of a batch, on the host, is written for; None: nothing stands before it."""
    writing: Writing
    with_answers: Callable[..., Batch]
    """(prompts, answers, sizes=…) -> a batch as those of the data are, whose labels are the answers."""
    say: Callable[[str], None]
    sizes: tuple[int, ...] = ()
    """Lengths that rows are padded to; (): to the longest of a micro-batch."""
    figures: Tensor = field(default_factory=lambda: torch.zeros(len(FIGURES), dtype=torch.int64))
    """Counts since the last record, of this rank."""
    said: set[str] = field(default_factory=set)

    def chosen(self, step: int, number: int) -> bool:
        """Toss the coin of a micro-batch: does the student write its answers?"""
        assert self.spec.on_policy is not None
        return seed_of(self.seed, step, number, 0, COIN) < self.spec.on_policy.share * 2**32

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
        counts, found = torch.zeros_like(self.figures), []
        with torch.random.fork_rng(devices), autocast_for(student, self.spec.precision):
            for number, batch in numbered:
                written = self._answer(student.eval(), batch, (self.seed, step, number), pieces, counts)
                found.append((number, written))
        self.figures += counts
        return found

    def _answer(self, student: Any, batch: Batch, numbers: tuple[int, int, int], pieces: int, counts: Tensor) -> Batch:
        """Return a micro-batch, with answers of the student where its coin says so, and count what happened."""
        counts[0] += 1
        if not self.chosen(*numbers[1:]):
            return batch
        given = self.prompts(batch)
        prompts = [prompt for prompt in given if prompt is not None]
        if len(prompts) < len(given):
            self._say_once("answers that nothing stands before are no prompt to write for, and are left out there")
        if not prompts:
            return batch
        answers: list[Tensor] = []
        size = -(-len(prompts) // pieces)
        for piece, start in enumerate(range(0, len(prompts), size)):
            torch.manual_seed(seed_of(*numbers, piece, TEXT))
            answers += self.writing(student, prompts[start : start + size])
        ended = sum(int(answer[-1]) in self.writing.ends for answer in answers)
        short = sum(self.writing.room(prompt) < self.writing.max_new_tokens for prompt in prompts)
        counts[1:] += torch.tensor([1, len(answers), sum(map(len, answers)), ended, short])
        if short:
            self._say_once("some prompts leave less room than max_new_tokens; metrics.jsonl has their share as `short`")
        return unlabelled(with_decoder_inputs(student, self.with_answers(prompts, answers, sizes=self.sizes)))

    def _say_once(self, line: str) -> None:
        if line not in self.said:
            self.said.add(line)
            self.say(f"on-policy: {line}")

    def read(self, accelerator: Accelerator) -> dict[str, float | int | None]:
        """Take out the figures since the last record, over all ranks. Collective."""
        total = accelerator.reduce(self.figures.to(accelerator.device), "sum").tolist()
        self.figures.zero_()
        micro, written, answers, tokens, ended, short = total
        shares = {"mean_tokens": tokens, "ended": ended, "short": short}
        means = {name: round(value / answers, 4) if answers else None for name, value in shares.items()}
        return {"share": written / micro if micro else None, "answers": answers, "tokens": tokens, **means}


def unlabelled(batch: Batch) -> Batch:
    """Take the labels of what a student wrote: the teacher is compared there, and nothing says that it is right."""
    labels = batch["labels"]
    return mark_padding({**batch, "written": labels != UNLABELLED, "labels": torch.full_like(labels, UNLABELLED)})

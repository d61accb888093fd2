"""One optimizer step over the micro-batches of all ranks; each term is a mean over its own global count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from distill.errors import RunError
from distill.files import write_json
from distill.models.forward import Batch, Outputs, row_count, to_device, token_count
from distill.training.checkpoint import TrainState
from distill.training.clock import Stopwatch
from distill.training.compiled import CompiledLayers, in_short
from distill.training.learner import Learner
from distill.training.on_policy import OnPolicy, seed_of

Teacher = Callable[[Batch], Outputs]
T = TypeVar("T")


class Window:
    """Sums since the last record, which stay on the device until they are read."""

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = names
        """Of the terms."""
        self.loss = torch.zeros((), device=device)
        self.sums = torch.zeros(len(names), device=device)
        self.counts = torch.zeros(len(names), dtype=torch.int64, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.used = torch.zeros((), device=device)
        self.steps = 0

    def add(self, loss: Tensor, sums: Tensor, counts: Tensor, norm: Tensor, bad: Tensor) -> None:
        """Add one step; of a skipped one only that it was there."""
        skipped = bad > 0
        self.loss += torch.where(skipped, 0, loss)
        self.sums += torch.where(skipped, 0, sums)
        self.counts += torch.where(skipped, 0, counts)
        self.used += 1 - bad
        self.grad_norm = norm
        self.steps += 1

    def read(self, accelerator: Accelerator) -> dict[str, Any]:
        """Average the loss per step, and each term over its positions on all ranks; null without any. Collective."""
        sums = accelerator.reduce(self.sums, "sum").tolist()
        counts, used, norm = self.counts.tolist(), self.used.item(), self.grad_norm.item()
        terms = {
            name: total / count if count else None for name, total, count in zip(self.names, sums, counts, strict=True)
        }
        loss = self.loss.item() / used if used else None
        return {"loss": loss, "terms": terms, "grad_norm": norm if np.isfinite(norm) else None}


@dataclass
class Step:
    """Takes steps with a learner."""

    learner: Learner
    teacher: Teacher | None
    seed: int
    steps: int
    """Length of the training."""
    state: TrainState
    """Where training stands."""
    request: Path
    """File in which a rank that ran out of memory asks the next start for smaller micro-batches."""
    compiled: CompiledLayers
    say: Callable[[str], None]
    on_policy: OnPolicy | None = None
    """Lets the student write some of the answers that it learns from."""
    tried: bool = False
    """All ranks have run the compiled layers once, or there is only one rank."""

    def __call__(self, numbered: Sequence[tuple[int, Batch]], window: Window, stop: bool) -> bool:
        """Take one step; returns True where any rank was asked to stop. Collective.

        Args:
            numbered: This rank's micro-batches, each with its number within the step.
            window: Receives the figures.
            stop: This rank was asked to stop.

        Raises:
            RunError: Memory is too small for a single example, or for one rank among several.
        """
        learner, accelerator = self.learner, self.learner.accelerator
        own = [batch for _, batch in numbered]
        counts = learner.wrapper.objective.counts(own)
        # The stop flag rides on the count's all-reduce, so that all ranks leave at the same step.
        extra = torch.tensor([sum(map(token_count, own)), int(stop)])
        totals = accelerator.reduce(_moved(torch.cat([counts, extra]), accelerator.device), "sum")
        counts, tokens = totals[:-2], totals[-2]
        stopped = _AsyncScalar(totals[-1]) if accelerator.num_processes > 1 else None
        if stopped and not self.tried:
            self._try_compiled(next(_split(numbered, 2**self.state.micro_batch_halvings))[1], counts)
        self.tried = True
        loss, sums = self._until_it_fits(numbered, lambda pieces: self._gradients(_split(numbered, pieces), counts))
        norm, bad = learner.step(self.state.step + 1, loss)
        window.add(loss, sums, counts, norm, bad)
        window.tokens += tokens
        # With one rank the local flag says it all, and the device is not waited for.
        return bool(stopped.item()) if stopped else stop

    def write(self, numbered: Sequence[tuple[int, Batch]], clock: Stopwatch) -> Sequence[tuple[int, Batch]]:
        """Let the student write answers of its own where `training.on_policy` asks for any, before all else of a step.

        The counts of the step are those of what was written. No record's speed has the seconds that it takes, on the
        slowest rank. Collective.
        """
        if (on_policy := self.on_policy) is None:
            return numbered
        wrapper = self.learner.wrapper
        with clock.paused(), self.compiled.set_aside():
            found = self._until_it_fits(
                numbered, lambda pieces: on_policy(wrapper.student, numbered, self.state.step, pieces)
            )
            wrapper.train()
            self.learner.accelerator.wait_for_everyone()
        on_policy.seconds += clock.last
        return found

    def _try_compiled(self, cpu_batch: Batch, counts: Tensor) -> None:
        """Run compiled layers once beside the wrapper that talks to other ranks: all give them up where one has to.

        A rank that found out later would leave the others waiting for its gradient. Collective.
        """
        compiled, learner, error = self.compiled, self.learner, None
        if not compiled.layers or learner.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return  # DeepSpeed's engine has a backward pass of its own
        try:
            torch.autograd.backward(self._forward(learner.wrapper, cpu_batch, counts, 0.0)[0])
        except torch.OutOfMemoryError:
            pass  # the step itself comes by it again, and knows what to do
        except Exception as failure:
            if not compiled.caused(failure):
                raise
            error = failure
        learner.wrapper.zero_grad()
        failed = torch.tensor([int(error is not None)], device=learner.accelerator.device)
        if learner.accelerator.reduce(failed, "sum").item():
            compiled.give_up(error)

    def _until_it_fits(self, numbered: Sequence[tuple[int, Batch]], work: Callable[[int], T]) -> T:
        """Do work in so many pieces of each micro-batch that it fits into memory."""
        while True:
            try:
                return work(2**self.state.micro_batch_halvings)
            except torch.OutOfMemoryError as error:
                self._halve(numbered, error)
            except Exception as error:
                if not self.compiled.caused(error):
                    raise
                if self.learner.accelerator.num_processes > 1:
                    raise RunError(
                        f"the layers cannot be compiled in step {self.state.step + 1} ({in_short(error)}), and the "
                        f"other ranks cannot wait: give the same command again with compile: false"
                    ) from error
                self.compiled.give_up(error)
            # The gradient of earlier micro-batches; `zero_grad` of Accelerate's optimizer would do nothing here.
            self.learner.model.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _halve(self, numbered: Sequence[tuple[int, Batch]], error: Exception) -> None:
        """Halve micro-batches from here on. Raises RunError where they hold one example, or other ranks wait."""
        state = self.state
        largest = math.ceil(max(row_count(batch) for _, batch in numbered) / 2**state.micro_batch_halvings)
        state.micro_batch_halvings += 1
        if largest < 2:
            raise RunError(f"out of memory with a single example in step {state.step + 1}: {error}") from error
        if self.learner.accelerator.num_processes > 1:
            # The others wait in a collective operation for gradients that this rank cannot give.
            write_json(self.request, [state.micro_batch_size, state.micro_batch_halvings])
            raise RunError(
                f"out of memory in step {state.step + 1} with micro-batches of up to {largest} examples, and "
                f"the other ranks cannot wait: give the same command again; it halves them from the start"
            ) from error
        compared = self.learner.wrapper.objective.kind.vectors
        self.say(
            f"OUT OF MEMORY in step {state.step + 1}: micro-batches of up to {largest} examples are halved from here "
            f"on; {'each text is compared with fewer others' if compared else 'the batch of a step stays what it is'}"
        )

    def _gradients(self, pieces: Iterable[tuple[tuple[int, ...], Batch]], counts: Tensor) -> tuple[Tensor, Tensor]:
        """Accumulate gradients; returns the loss of the step over all ranks [] and this rank's sums [terms]."""
        learner, accelerator, micro = self.learner, self.learner.accelerator, list(pieces)
        accelerator.step, accelerator.gradient_accumulation_steps = 0, len(micro)
        progress = self.state.step / max(1, self.steps - 1)
        loss, sums = torch.zeros((), device=accelerator.device), torch.zeros(len(counts), device=accelerator.device)
        for number, cpu_batch in micro:
            torch.manual_seed(seed_of(self.seed, self.state.step, *number))
            with accelerator.accumulate(learner.model):
                share, per_term = self._forward(learner.model, cpu_batch, counts, progress)
                learner.backward(share)
            loss += share.detach()
            sums += per_term
        return accelerator.reduce(loss, "sum"), sums

    def _forward(self, module: nn.Module, cpu_batch: Batch, counts: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """Run the teacher and `module`, wrapped or not; returns a micro-batch's share of the loss [], sums [terms]."""
        device = self.learner.accelerator.device
        # Positions are found on the host, which would have to wait for the device otherwise.
        located = self.learner.wrapper.objective.locate(cpu_batch)
        batch = {name: _moved(tensor, device) for name, tensor in located.items()}
        result: tuple[Tensor, Tensor] = module(batch, self.teacher(batch) if self.teacher else None, counts, progress)
        return result


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor from the host; a copy out of memory that is not pinned would wait for all that a GPU has to do."""
    pinned = tensor.pin_memory() if device.type == "cuda" and not tensor.is_pinned() else tensor
    return to_device(pinned, device)


class _AsyncScalar:
    """A number being copied from the device to the host; reading it does not wait for work queued after the copy."""

    def __init__(self, tensor: Tensor):
        self.value = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self.value.copy_(tensor, non_blocking=True)
        self.arrived = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def item(self) -> float:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.value.item()


def check_passes(batch_size: int, micro_batch_size: int, halvings: int) -> None:
    """Refuse micro-batches of which one has fewer pieces than the others, so that a rank would run fewer passes.

    Where ranks hold shards of the weights, each pass gathers them: the others would wait for ever. Raises RunError.
    """
    rest = batch_size % micro_batch_size
    if 0 < rest < 2**halvings:
        raise RunError(
            f"for want of memory micro-batches of {micro_batch_size} examples run in {2**halvings} passes, and the "
            f"last one of a step has {rest}; ranks that shard weights must run as many passes each: make batch_size "
            f"a multiple of micro_batch_size"
        )


def _split(numbered: Sequence[tuple[int, Batch]], pieces: int) -> Iterator[tuple[tuple[int, ...], Batch]]:
    """Split each micro-batch into so many pieces, one example at least; yields (numbers to seed its dropout, piece)."""
    for number, batch in numbered:
        if pieces == 1:
            yield (number,), batch
            continue
        rows = row_count(batch)
        # The texts of one example stay together.
        examples = {name: tensor.reshape(rows, -1, *tensor.shape[1:]) for name, tensor in batch.items()}
        for piece in range(min(pieces, rows)):
            parts = {name: tensor.tensor_split(pieces)[piece] for name, tensor in examples.items()}
            yield (number, piece), {name: tensor.flatten(0, 1) for name, tensor in parts.items()}

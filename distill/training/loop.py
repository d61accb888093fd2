"""The training loop: one optimizer step at a time, normalised over all processes and micro-batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from distill.errors import RunError, Stopped
from distill.models.outputs import Batch, Outputs
from distill.recipe.schema import Optimization
from distill.rundir import TrainDir
from distill.training import checkpoint
from distill.training.checkpoint import TrainState
from distill.training.guards import StopSignals
from distill.training.model import Constraint, DistillModel, Loss
from distill.training.schedule import lr_factor
from distill.training.setup import Batches, freeze, horizon, make_optimizer
from distill.training.tracking import Tracker

Teacher = Callable[[Batch], Outputs]
Evaluate = Callable[[Any], Mapping[str, float | None]]


@dataclass(frozen=True)
class Job:
    """One training: how, where and under which name."""

    title: str
    """Shown beside the progress bar."""
    spec: Optimization
    """Steps, rates and sizes."""
    folder: TrainDir
    """Checkpoints and metrics."""
    seed: int
    """Seeds sample order and dropout."""
    identity: str
    """Fingerprint of recipe, teacher and data; a checkpoint with another one is not continued."""
    log_every: int = 10
    """Steps between records."""
    evaluate_every: int = 0
    """Steps between evaluations; 0: only after the last step."""
    constraint: Constraint | None = None
    """What must hold of the weights after every step."""


class Window:
    """Sums since the last record; they stay on the device until they are read."""

    def __init__(self, terms: int, device: torch.device):
        self.loss = torch.zeros((), device=device)
        self.sums = torch.zeros(terms, device=device)
        self.counts = torch.zeros(terms, dtype=torch.int64, device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.steps = 0

    def read(self, accelerator: Accelerator, names: Sequence[str]) -> dict[str, Any]:
        """Mean loss per step, mean of each term over its own positions, over all processes."""
        own = torch.cat([self.loss.reshape(1), self.sums])
        loss, *sums = accelerator.reduce(own, "sum").tolist()
        counts = self.counts.tolist()
        parts = {name: total / max(1, count) for name, total, count in zip(names, sums, counts, strict=True)}
        norm = self.grad_norm.item()
        return {"loss": loss / self.steps, "parts": parts, "grad_norm": norm if np.isfinite(norm) else None}


def train(
    job: Job,
    student: Any,
    objective: Loss,
    teacher: Teacher | None,
    batches: Batches,
    accelerator: Accelerator,
    *,
    evaluate: Evaluate | None = None,
    say: Callable[[str], None],
) -> TrainState:
    """Train `student` in place, continuing from the newest checkpoint of the same job.

    Args:
        job: How, where and under which name.
        student: A transformers model on the CPU; left in eval mode, with the final weights.
        objective: What is minimised.
        teacher: A batch in, its outputs out; None where no term needs it.
        batches: The micro-batches of every step.
        accelerator: From `make_accelerator`.
        evaluate: Model -> metrics; called on every process.
        say: Where notices go.

    Raises:
        Stopped: A signal came; the checkpoint of the last step is published.
        RunError: The loss is not finite.
    """
    torch.manual_seed(job.seed)
    steps = horizon(job.spec, batches)
    freeze(student, job.spec.freeze, job.spec.only)
    wrapper = DistillModel(student, objective).train()
    optimizer = make_optimizer(wrapper, job.spec)
    # Read before wrapping: DDP then spreads what every process has read from the same files anyway.
    found = checkpoint.newest_valid(job.folder.checkpoints, job.identity, say)
    accelerator.wait_for_everyone()
    model, prepared = accelerator.prepare(wrapper, optimizer)
    state = _start(job, found, wrapper, optimizer)
    if found is not None:
        say(f"{job.title}: continuing after step {state.step} of {steps} ({found.name})")
    with (
        StopSignals() as stop,
        Tracker(job.folder.metrics, job.title, state.step, steps, active=accelerator.is_main_process) as tracker,
    ):
        run = _Run(
            job=job,
            accelerator=accelerator,
            model=model,
            wrapper=wrapper,
            teacher=teacher,
            batches=batches,
            prepared=prepared,
            optimizer=optimizer,
            state=state,
            steps=steps,
            stop=stop,
            tracker=tracker,
        )
        run.steps_to_the_end(evaluate)
    wrapper.eval()
    accelerator.free_memory()
    return state


def _start(job: Job, found: Path | None, wrapper: DistillModel, optimizer: torch.optim.Optimizer) -> TrainState:
    """Where training stands: at a checkpoint, whose tensors are put in place, or before the first step."""
    if found is None:
        if job.constraint:
            job.constraint.after_step(0)
        return TrainState()
    if job.constraint:
        job.constraint.load(checkpoint.load_constraint(found))
    return checkpoint.load(found, wrapper, optimizer)


@dataclass
class _Run:
    """One training under way: what the loop holds in its hands."""

    job: Job
    accelerator: Accelerator
    model: nn.Module
    """The prepared module; always called through this wrapper."""
    wrapper: DistillModel
    """The same module, unwrapped."""
    teacher: Teacher | None
    batches: Batches
    prepared: Any
    optimizer: torch.optim.Optimizer
    state: TrainState
    steps: int
    stop: StopSignals
    tracker: Tracker

    def steps_to_the_end(self, evaluate: Evaluate | None) -> None:
        job, state, accelerator = self.job, self.state, self.accelerator
        objective = self.wrapper.objective
        window, since = Window(len(objective.names), accelerator.device), time.monotonic()
        world, rank = accelerator.num_processes, accelerator.process_index
        for numbered in self.batches.stream(state.step, self.steps, rank, world):
            rate = job.spec.lr * lr_factor(state.step, self.steps, job.spec.warmup, job.spec.schedule)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            stopping = self.step(numbered, window)
            state.step += 1
            state.examples += self.batches.batch_size
            if job.constraint:
                job.constraint.after_step(state.step)
            self.tracker.advance(state.step)
            final = state.step == self.steps
            saving = final or stopping or _due(job.spec.save_every, state.step)
            if saving or _due(job.log_every, state.step):  # also checks the loss: nothing broken is ever saved
                now = time.monotonic()
                self.log(window, rate, now - since)
                state.seconds += now - since
                window, since = Window(len(objective.names), accelerator.device), now
            if evaluate and (final or _due(job.evaluate_every, state.step)):
                before = time.monotonic()
                self.measure(evaluate)
                since += time.monotonic() - before
            if saving:
                self.save()
            if stopping:
                break
        if self.anyone_stopped():
            raise Stopped(
                f"after step {state.step} of {self.steps}; a checkpoint is saved, the same command continues from it"
            )

    def anyone_stopped(self) -> bool:
        """Whether any process was asked to stop, also during the last step, its evaluation or its save."""
        flag = torch.tensor([int(self.stop.requested)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def step(self, numbered: Sequence[tuple[int, Batch]], window: Window) -> bool:
        """One optimizer step; returns whether any process was asked to stop."""
        accelerator, objective = self.accelerator, self.wrapper.objective
        own = [batch for _, batch in numbered]
        # The stop flag rides on the count's all-reduce, so that all processes leave at the same step.
        flag = torch.tensor([int(self.stop.requested)])
        totals = accelerator.reduce(torch.cat([objective.counts(own), flag]).to(accelerator.device), "sum")
        counts, stopped = totals[:-1], totals[-1]
        scale = accelerator.num_processes * len(own)  # undoes DDP's mean and Accelerate's division
        progress = self.state.step / max(1, self.steps - 1)
        for number, cpu_batch in numbered:
            batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in cpu_batch.items()}
            torch.manual_seed(_seed_of(self.job.seed, self.state.step, number))
            with accelerator.accumulate(self.model):
                loss, sums = self.model(batch, self.teacher(batch) if self.teacher else None, counts, progress)
                accelerator.backward(loss * scale)
                if accelerator.sync_gradients and self.job.constraint:
                    self.job.constraint.before_step()
                if accelerator.sync_gradients and self.job.spec.max_grad_norm:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), self.job.spec.max_grad_norm)
                    window.grad_norm = norm.detach()
                self.prepared.step()
                self.prepared.zero_grad()
            window.loss += loss.detach()
            window.sums += sums
        window.counts += counts
        window.steps += 1
        # With one process the local flag says it all, and the device is not waited for.
        return bool(stopped.item()) if accelerator.num_processes > 1 else self.stop.requested

    def log(self, window: Window, rate: float, seconds: float) -> None:
        """Write one record. Raises RunError when the loss is not finite."""
        figures = window.read(self.accelerator, self.wrapper.objective.names)
        record = {
            "event": "train",
            "step": self.state.step,
            "epoch": round(self.batches.epoch_at(self.state.step), 4),
            "lr": rate,
            **figures,
            **(self.job.constraint.figures() if self.job.constraint else {}),
            "examples_per_s": round(window.steps * self.batches.batch_size / max(seconds, 1e-9), 2),
        }
        if not np.isfinite(figures["loss"]):
            saved = checkpoint.published(self.job.folder.checkpoints)
            last = f"the last checkpoint is {saved[-1].name}" if saved else "there is no checkpoint yet"
            raise RunError(
                f"{self.job.title}: the loss is {figures['loss']} by step {self.state.step}; {last}. "
                f"Lower lr, or check the teacher and the data"
            )
        self.tracker.record(record)

    def measure(self, evaluate: Evaluate) -> None:
        """Evaluate and record; every process takes part."""
        self.wrapper.eval()
        metrics = evaluate(self.wrapper.student)
        self.wrapper.train()
        self.tracker.record({"event": "evaluate", "step": self.state.step, "metrics": dict(metrics)})

    def save(self) -> None:
        """Publish a checkpoint from the main process."""
        if self.accelerator.is_main_process:
            held = self.job.constraint.tensors() if self.job.constraint else {}
            folder, identity = self.job.folder.checkpoints, self.job.identity
            checkpoint.save(folder, self.state, self.wrapper, self.optimizer, identity, held)
        self.accelerator.wait_for_everyone()


def _due(every: int, step: int) -> bool:
    """Whether something done every so many steps (0: never) is done after this one."""
    return every > 0 and step % every == 0


def _seed_of(seed: int, step: int, number: int) -> int:
    """A seed for the dropout of one micro-batch: the same whichever process computes it, and after any restart."""
    return int(np.random.SeedSequence([seed, step, number]).generate_state(1)[0])

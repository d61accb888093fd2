"""The training loop: one optimizer step at a time, normalised over all processes and micro-batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import nn

from distill.errors import InputError, RunError, Stopped
from distill.models.outputs import Batch, Outputs
from distill.recipe.schema import Optimization
from distill.rundir import TrainDir
from distill.training import checkpoint
from distill.training.checkpoint import TrainState
from distill.training.guards import StopSignals, check_launch, processes
from distill.training.model import DistillModel, Loss
from distill.training.schedule import lr_factor
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


class Batches(Protocol):
    """What the loop needs of the data (`distill.data.TrainingBatches`)."""

    @property
    def batch_size(self) -> int:
        """Examples per step over all processes."""

    def micro_batches_per_step(self) -> int:
        """Forward passes per optimizer step over all processes."""

    def steps_for(self, epochs: float) -> int:
        """Optimizer steps in so many epochs."""

    def epoch_at(self, step: int) -> float:
        """Epochs done after `step` steps."""

    def stream(self, start: int, stop: int, rank: int, world: int) -> Iterator[list[tuple[int, Batch]]]:
        """This process's (number within the step, micro-batch) pairs, step by step."""


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
        return {"loss": loss / self.steps, "parts": parts, "grad_norm": self.grad_norm.item()}


def make_accelerator(spec: Optimization, batches: Batches) -> Accelerator:
    """An Accelerator for one training, which may have been started by `accelerate launch`.

    Raises:
        InputError: The launch is not what it seems, or the step cannot be dealt out evenly to the processes.
    """
    world = processes().num_processes
    check_launch(world)
    count = batches.micro_batches_per_step()
    if count % world:
        raise InputError(
            f"training: a step has {count} micro-batches (batch_size / micro_batch_size), "
            f"which {world} processes cannot share evenly; lower micro_batch_size"
        )
    # Windows are closed by count alone: the stream of batches has no end for Accelerate to see.
    plugin = GradientAccumulationPlugin(num_steps=count // world, sync_with_dataloader=False)
    precision = "no" if spec.precision == "fp32" else spec.precision
    return Accelerator(mixed_precision=precision, gradient_accumulation_plugin=plugin)


def horizon(spec: Optimization, batches: Batches) -> int:
    """Optimizer steps of the whole training."""
    if spec.steps is not None:
        return spec.steps
    assert spec.epochs is not None, "load_recipe checks that one of steps and epochs is given"
    return batches.steps_for(spec.epochs)


def make_optimizer(model: nn.Module, spec: Optimization) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); vectors (biases, norms) are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    # The fused kernel is about 9 times faster than the default on a CPU, and the fastest one on a GPU.
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=spec.lr, betas=spec.betas, fused=True)


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
    wrapper = DistillModel(student, objective).train()
    optimizer = make_optimizer(wrapper, job.spec)
    # Read before wrapping: DDP then spreads what every process has read from the same files anyway.
    found = checkpoint.newest_valid(job.folder.checkpoints, job.identity, say)
    accelerator.wait_for_everyone()
    model, prepared = accelerator.prepare(wrapper, optimizer)
    state = TrainState() if found is None else checkpoint.load(found, wrapper, optimizer)
    if found is not None:
        say(f"{job.title}: continuing after step {state.step} of {steps} ({found.name})")
    with (
        StopSignals() as stop,
        Tracker(job.folder.metrics, job.title, state.step, steps, active=accelerator.is_main_process) as tracker,
    ):
        run = _Run(job, accelerator, model, wrapper, teacher, batches, prepared, optimizer, state, steps, stop, tracker)
        run.steps_to_the_end(evaluate)
    wrapper.eval()
    accelerator.free_memory()
    return state


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
            self.tracker.advance(state.step)
            final = state.step == self.steps
            if state.step % job.log_every == 0 or final or stopping:
                now = time.monotonic()
                self.log(window, rate, now - since)
                state.seconds += now - since
                window, since = Window(len(objective.names), accelerator.device), now
            if evaluate and (final or (job.evaluate_every and state.step % job.evaluate_every == 0)):
                self.measure(evaluate)
                since = time.monotonic()
            if final or stopping or (job.spec.save_every and state.step % job.spec.save_every == 0):
                self.save()
            if stopping and not final:
                raise Stopped(
                    f"stopped by a signal after step {state.step} of {self.steps}; a checkpoint is saved, "
                    f"and the same command continues from it"
                )

    def step(self, numbered: Sequence[tuple[int, Batch]], window: Window) -> bool:
        """One optimizer step; returns whether any process was asked to stop."""
        accelerator, objective = self.accelerator, self.wrapper.objective
        own = [batch for _, batch in numbered]
        # The stop flag rides on the count's all-reduce, so that all processes leave at the same step.
        flagged = torch.cat([objective.counts(own), torch.tensor([int(self.stop.requested)])]).to(accelerator.device)
        *_, flag = flagged = accelerator.reduce(flagged, "sum")
        counts = flagged[:-1]
        scale = accelerator.num_processes * len(own)  # undoes DDP's mean and Accelerate's division
        for number, cpu_batch in numbered:
            batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in cpu_batch.items()}
            torch.manual_seed(_seed_of(self.job.seed, self.state.step, number))
            with accelerator.accumulate(self.model):
                loss, sums = self.model(batch, self.teacher(batch) if self.teacher else None, counts)
                accelerator.backward(loss * scale)
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
        return bool(flag.item()) if accelerator.num_processes > 1 else self.stop.requested

    def log(self, window: Window, rate: float, seconds: float) -> None:
        """Write one record. Raises RunError when the loss is not finite."""
        figures = window.read(self.accelerator, self.wrapper.objective.names)
        record = {
            "event": "train",
            "step": self.state.step,
            "epoch": round(self.batches.epoch_at(self.state.step), 4),
            "lr": rate,
            **figures,
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
            checkpoint.save(self.job.folder.checkpoints, self.state, self.wrapper, self.optimizer, self.job.identity)
        self.accelerator.wait_for_everyone()


def _seed_of(seed: int, step: int, number: int) -> int:
    """A seed for the dropout of one micro-batch: the same whichever process computes it, and after any restart."""
    return int(np.random.SeedSequence([seed, step, number]).generate_state(1)[0])

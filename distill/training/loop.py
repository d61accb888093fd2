"""The training loop: steps, records, evaluations and checkpoints, each when it is due."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distill.errors import RunError, Stopped
from distill.recipe.schema import Training
from distill.training.checkpoint import Checkpoints, TrainState, state_of
from distill.training.learner import Learner
from distill.training.optim import lr_factor
from distill.training.setup import Constrain, horizon, make_accelerator, make_learner
from distill.training.signals import StopSignals
from distill.training.step import Step, Teacher, Window
from distill.training.tracking import Tracker
from distill.training.watchdog import Watchdog
from distill.training.writer import CheckpointWriter

if TYPE_CHECKING:
    from distill.data import TrainingBatches
    from distill.losses import Objective

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
MICRO_BATCHES = "micro_batches.json"
"""In the folder of a training: checkpoints, one record per line, and the request for smaller micro-batches after a rank
ran out of memory, [size, halvings]."""

Stop = Callable[[], bool]
Evaluate = Callable[[Any, Stop], Mapping[str, float | None]]


@dataclass(frozen=True)
class Job:
    """One training: its title, settings and folder."""

    title: str
    """Shown beside the progress."""
    spec: Training
    """Steps, rates and sizes, and when to log, evaluate and save."""
    folder: Path
    """Checkpoints and metrics."""
    seed: int
    """Seeds sample order and dropout."""
    made_from: Mapping[str, Any]
    """Dotted keys and values of recipe, teacher and data; a checkpoint with others is continued only when asked."""
    constrain: Constrain | None = None
    """Makes the masks, where weights are masked."""
    higher_is_better: bool = True
    """Direction of the metric `spec.keep_best`."""
    peak_tokens_per_second: float | None = None
    """Speed if all time went into matrix products; records give the share of it that is reached (MFU)."""
    continue_changed: bool = False
    """Continue from a checkpoint that was made from other inputs as well."""


def train(
    job: Job,
    student: Any,
    objective: Objective,
    teacher: Teacher | None,
    batches: TrainingBatches,
    *,
    evaluate: Evaluate | None = None,
    say: Callable[[str], None],
) -> None:
    """Train `student` in place, continuing from the newest checkpoint of the same job.

    Args:
        job: Its title, settings and folder.
        student: A transformers model on the CPU; left in eval mode, with the final weights.
        objective: Minimised.
        teacher: A batch in, its outputs out; None where no term needs it.
        batches: The micro-batches of every step.
        evaluate: (model, function that says when to give up) -> metrics; called on every rank.
        say: Receives notices.

    Raises:
        InputError: A checkpoint that was made from other inputs was asked for and cannot be continued.
        Stopped: A signal came; the checkpoint of the last step is published.
        RunError: Too many steps in a row had to be left out, memory or disk are too small, or a loader worker died.
    """
    torch.manual_seed(job.seed)
    steps, accelerator = horizon(job.spec, batches), make_accelerator(job.spec, job.folder)
    checkpoints = Checkpoints(job.folder / CHECKPOINTS, job.made_from, say, continue_changed=job.continue_changed)
    # Read before wrapping: DDP then spreads what every rank has read from the same files anyway.
    found = checkpoints.newest_valid(steps)
    accelerator.wait_for_everyone()
    learner = make_learner(student, objective, job.spec, job.constrain, accelerator, found)
    state = TrainState() if found is None else state_of(found)
    if found is not None:
        say(f"{job.title}: continuing after step {state.step} of {steps} ({found.name})")
    _set_micro_batches(state, batches.micro_batch_size, job, student, say)
    step = Step(learner, teacher, job.seed, steps, job.folder / MICRO_BATCHES, say)
    watchdog = Watchdog(say, active=accelerator.num_processes > 1)
    with (
        StopSignals() as stop,
        Tracker(job.folder / METRICS, job.title, state.step, steps, accelerator) as tracker,
        CheckpointWriter(checkpoints, say) as writer,
        _out_of_resources(writer),
    ):
        run = _Run(job, learner, step, batches, evaluate, writer, state, steps, stop, tracker, watchdog, say)
        run.to_the_end()
    learner.finish()
    accelerator.free_memory()


def _set_micro_batches(state: TrainState, size: int, job: Job, student: Any, say: Callable[[str], None]) -> None:
    """Note the size of micro-batches in `state`, and how often they are halved; says what another size changes."""
    if state.micro_batch_size != size:
        if state.step:
            rates = [rate for key, rate in student.config.to_dict().items() if "drop" in key]
            dropout = any(isinstance(rate, float) and rate > 0 for rate in rates)
            effect = "dropout falls differently from here on" if dropout else "this changes nothing but rounding"
            say(f"{job.title}: micro_batch_size is {size} and was {state.micro_batch_size}: {effect}")
        state.micro_batch_size, state.micro_batch_halvings = size, 0
    if (request := job.folder / MICRO_BATCHES).exists():
        requested, halvings = json.loads(request.read_text(encoding="utf-8"))
        if requested == size:
            state.micro_batch_halvings = max(state.micro_batch_halvings, halvings)


@dataclass
class _Run:
    """One training under way."""

    job: Job
    learner: Learner
    step: Step
    batches: TrainingBatches
    evaluate: Evaluate | None
    writer: CheckpointWriter
    state: TrainState
    steps: int
    stop: StopSignals
    tracker: Tracker
    watchdog: Watchdog
    say: Callable[[str], None]
    improved: bool = False
    """True between an evaluation with the best metric so far and its save."""

    def to_the_end(self) -> None:
        """Take every step that is left, and log, evaluate and save where due. Raises Stopped after a signal."""
        job, state, accelerator = self.job, self.state, self.learner.accelerator
        window, since = self._window(), time.monotonic()
        stopping = self.measure()  # where a start comes after the step and before its evaluation
        self.save(newest=False)
        world, rank = accelerator.num_processes, accelerator.process_index
        for numbered in self.batches.stream(state.step, self.steps, rank, world, job.spec.loader_workers):
            with self.watchdog.over("step"):
                rate = self._set_rate()
                stopping |= self.step(numbered, state, window, self.stop.requested)
            state.step += 1
            state.examples += self.batches.batch_size
            self.tracker.advance(state.step)
            saving = state.step == self.steps or stopping or _due(job.spec.save_every, state.step)
            if saving or _due(job.spec.log_every, state.step):
                now = time.monotonic()
                self.log(window, rate, now - since)
                window, since = self._window(), now
            if not stopping:
                before = time.monotonic()
                stopping = self.measure()
                since += time.monotonic() - before
            since += self.save(newest=saving or stopping)
            if stopping:
                break
        self.settle()
        if self.anyone_stopped():
            raise Stopped(
                f"after step {state.step} of {self.steps}; a checkpoint is saved, the same command continues from it"
            )

    def _window(self) -> Window:
        return Window(len(self.learner.wrapper.objective.names), self.learner.accelerator.device)

    def _set_rate(self) -> float:
        spec = self.job.spec
        rate = spec.lr * lr_factor(self.state.step, self.steps, spec.warmup, spec.schedule, spec.decay)
        for group in self.learner.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def anyone_stopped(self) -> bool:
        """Ask all ranks whether one was told to stop, also during the last step, its evaluation or its save."""
        accelerator = self.learner.accelerator
        flag = torch.tensor([int(self.stop.requested)], device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item())

    def log(self, window: Window, rate: float, seconds: float) -> None:
        """Write one record. Raises RunError when too many steps in a row were skipped."""
        state, learner, job = self.state, self.learner, self.job
        figures = window.read(learner.accelerator, learner.wrapper.objective.names)
        skipped, in_a_row = learner.skip_rule.skipped.tolist()
        tokens = int(window.tokens.item())
        state.tokens += tokens
        state.seconds += seconds
        seconds = max(seconds, 1e-9)
        peak = job.peak_tokens_per_second
        record = {
            "event": "train",
            "step": state.step,
            "epoch": round(self.batches.epoch_at(state.step), 4),
            "lr": rate,
            **figures,
            **(learner.masks.figures() if learner.masks else {}),
            "skipped": skipped,
            "examples_per_s": round(window.steps * self.batches.batch_size / seconds, 2),
            "tokens_per_s": round(tokens / seconds, 1),
            "mfu": round(tokens / seconds / peak, 4) if peak else None,
            "tokens": state.tokens,
        }
        self.tracker.record(record)
        if in_a_row >= min(job.spec.max_skipped, self.steps):
            raise RunError(
                f"{job.title}: the last {in_a_row} steps up to step {state.step} were left out, their loss or "
                f"gradient is not finite; {self.writer.last_good()}. Lower lr, or check the teacher and the data"
            )

    def measure(self) -> bool:
        """Evaluate and record where due; returns True, with nothing recorded, where a rank was asked to stop."""
        job, state = self.job, self.state
        due = state.step == self.steps or (state.step > 0 and _due(job.spec.evaluate_every, state.step))
        if self.evaluate is None or not due or state.evaluated == state.step:
            return False
        with self.watchdog.over("evaluation"), self.learner.measured() as model:
            metrics = self.evaluate(model, self.stop.asked)
        if self.anyone_stopped():
            return True
        state.evaluated = state.step
        self.tracker.record({"event": "evaluate", "step": state.step, "metrics": dict(metrics)})
        if job.spec.keep_best is not None:
            self._keep_best(metrics[job.spec.keep_best])
        return False

    def _keep_best(self, value: float | None) -> None:
        job, best = self.job, self.state.best
        if value is not None and (best is None or (value > best if job.higher_is_better else value < best)):
            self.state.best, self.improved = value, True

    def save(self, *, newest: bool) -> float:
        """Have a checkpoint written: as the `newest` one, as the best one where it is that, or not at all. Collective.

        It is published when `settle` comes back. After the first step, memory for the copies is seen to. Returns the
        seconds that training stood still: for the copy, and for what was left to write of the one before.
        """
        start = time.monotonic()
        if not (newest or self.improved):
            if self.state.step and not self.writer.prepared:
                self.writer.prepare(self.learner.contents()[0], whole=self.learner.saves_whole)
            return time.monotonic() - start
        self.settle()
        # The best one first: after a kill between both, training comes by this evaluation again.
        best = Checkpoints(self.job.folder / CHECKPOINTS / "best", self.job.made_from, self.say, keep=1)
        places = [best] * self.improved + [self.writer.checkpoints] * newest
        self.improved = False
        with self.watchdog.over("save"):
            tensors, self.state.numbers = self.learner.contents()
            self.writer.save(places, self.state, tensors, whole=self.learner.saves_whole)
        return time.monotonic() - start

    def settle(self) -> None:
        """Wait until the checkpoint in flight is published. Raises RunError where it could not be. Collective."""
        if self.writer.flight is not None:
            with self.watchdog.over("publication"):
                seconds = self.writer.settle()
            self.watchdog.note("publication", seconds)


@contextmanager
def _out_of_resources(writer: CheckpointWriter) -> Iterator[None]:
    """Turn an error of memory or of a loader worker into a RunError that names the last good checkpoint."""
    try:
        yield
    except torch.OutOfMemoryError as error:  # not of a forward or backward pass, which are taken again
        raise RunError(f"out of memory: {error}; {writer.last_good()}") from error
    except RuntimeError as error:
        # Of a worker that died torch tells from a signal handler, wherever the main thread is just then.
        if "DataLoader" not in str(error):
            raise
        raise RunError(f"a loader worker is dead or hangs: {error}; {writer.last_good()}") from error


def _due(every: int, step: int) -> bool:
    """Tell whether something done every so many steps (0: never) is done after this one."""
    return every > 0 and step % every == 0

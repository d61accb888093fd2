"""The training loop: steps, records, evaluations and checkpoints, each when it is due."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distill.errors import RunError, Stopped
from distill.files import read_written
from distill.recipe.schema import Training
from distill.teacher import LiveTeacher, Mixture
from distill.training.checkpoint import Checkpoints, TrainState, state_of
from distill.training.clock import Stopwatch, Utilisation
from distill.training.compiled import compiled_layers
from distill.training.learner import Learner
from distill.training.on_policy import OnPolicy
from distill.training.optim import lr_factor
from distill.training.setup import Constrain, horizon, make_accelerator, make_learner
from distill.training.signals import StopSignals
from distill.training.step import Step, Teacher, Window, check_passes
from distill.training.tracking import Tracker
from distill.training.watchdog import Watchdog
from distill.training.writer import CheckpointWriter, out_of_resources

if TYPE_CHECKING:
    from distill.data import TrainingBatches
    from distill.losses import Objective

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
MICRO_BATCHES = "micro_batches.json"
"""In the folder of a training: checkpoints, one record per line, and the request for smaller micro-batches after a rank
ran out of memory, [size, halvings]."""

SIZED_STEPS = 100
"""Steps whose padding is counted."""

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
    utilisation: Utilisation | None = None
    """Gives the MFU of a speed, for the records; None: not known."""
    continue_changed: bool = False
    """Continue from a checkpoint that was made from other inputs as well."""


def train(
    job: Job,
    student: Any,
    objective: Objective,
    teacher: Teacher | None,
    batches: TrainingBatches,
    *,
    on_policy: OnPolicy | None = None,
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
        on_policy: Lets the student write some of the answers that it learns from.
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
    learner = make_learner(student, objective, job.spec, job.constrain, accelerator, found, say)
    state = TrainState() if found is None else state_of(found)
    if found is not None:
        say(f"{job.title}: continuing after step {state.step} of {steps} ({found.name})")
    _set_micro_batches(state, batches.micro_batch_size, job, student, say)
    if learner.sharded and accelerator.num_processes > 1:
        check_passes(batches.batch_size, batches.micro_batch_size, state.micro_batch_halvings)
    fixed = job.spec.head_precision
    objective.head_precision = state.head_precision if fixed == "auto" else fixed
    watchdog = Watchdog(say, active=accelerator.num_processes > 1)
    models = [learner.wrapper.student, *(teacher.models if isinstance(teacher, LiveTeacher | Mixture) else [])]
    with (
        StopSignals() as stop,
        Tracker(job.folder / METRICS, job.title, state.step, steps, accelerator) as tracker,
        CheckpointWriter(checkpoints, say) as writer,
        out_of_resources(writer),
        compiled_layers(job.spec.compile, models, objective, accelerator, job.title, say) as compiled,
    ):
        batches = _in_sizes(batches, job.title, steps, say) if compiled.layers else batches
        step = Step(learner, teacher, job.seed, steps, state, job.folder / MICRO_BATCHES, compiled, say, on_policy)
        run = _Run(job, learner, step, batches, evaluate, writer, stop, tracker, watchdog)
        run.run_steps()
    learner.finish()
    accelerator.free_memory()


def _in_sizes(batches: TrainingBatches, title: str, steps: int, say: Callable[[str], None]) -> TrainingBatches:
    """Pad rows to a few lengths, as compiled layers want them, and say what that adds."""
    sized = batches.in_sizes()
    looked_at = min(steps, SIZED_STEPS)
    added = sized.padding_added(looked_at)
    say(
        f"{title}: layers are compiled, so rows are padded to {len(sized.sizes)} lengths up to {sized.sizes[-1]}, "
        f"{added:.1%} more positions (in the first {looked_at} steps)"
    )
    return sized


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
        requested, halvings = read_written(request, tuple[int, int])
        if requested == size and halvings > state.micro_batch_halvings:
            state.micro_batch_halvings = halvings
            say(f"{job.title}: memory ran out before, so micro-batches run in {2**halvings} passes ({request.name})")


@dataclass
class _Run:
    """One training under way."""

    job: Job
    learner: Learner
    step: Step
    batches: TrainingBatches
    evaluate: Evaluate | None
    writer: CheckpointWriter
    stop: StopSignals
    tracker: Tracker
    watchdog: Watchdog
    improved: bool = False
    """True between an evaluation with the best metric so far and its save."""

    def __post_init__(self) -> None:
        self.state, self.steps, self.say = self.step.state, self.step.steps, self.step.say
        if self.step.on_policy is not None:
            self.step.on_policy.sizes = self.batches.sizes
        device = self.learner.accelerator.device
        self.clock, self.window = Stopwatch(device), Window(self.learner.wrapper.objective.names, device)

    def run_steps(self) -> None:
        """Take every step that is left, and log, evaluate and save where due. Raises Stopped after a signal."""
        job, state, accelerator = self.job, self.state, self.learner.accelerator
        stopping = self.measure()  # where a start comes after the step and before its evaluation
        self.save(newest=False)
        world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
        for given in self.batches.stream(state.step, self.steps, rank, world, job.spec.loader_workers, device):
            with self.watchdog.guard("step"):
                self._set_rate()
                stopping |= self.step(self.step.write(given, self.clock), self.window, self.stop.requested)
            for line in self.learner.wrapper.objective.notices():
                self.say(f"{job.title}: {line}")
            state.step += 1
            self.tracker.advance(state.step)
            saving = state.step == self.steps or stopping or _due(job.spec.save_every, state.step)
            if saving or _due(job.spec.log_every, state.step):
                self.log()
            if not stopping and self.measure():
                stopping = True
                self.log()
            self.save(newest=saving or stopping)
            if stopping:
                break
        self.settle()
        if self.anyone_stopped():
            raise Stopped(
                f"after step {state.step} of {self.steps}; a checkpoint is saved, the same command continues from it"
            )

    def _set_rate(self) -> None:
        spec = self.job.spec
        rate = spec.lr * lr_factor(self.state.step, self.steps, spec.warmup, spec.schedule, spec.decay)
        for group in self.learner.optimizer.param_groups:
            group["lr"] = rate

    def anyone_stopped(self) -> bool:
        """Ask all ranks whether one was told to stop, also during the last step, its evaluation or its save."""
        accelerator = self.learner.accelerator
        flag = torch.tensor([int(self.stop.requested)], device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item())

    def log(self) -> None:
        """Write one record of the steps since the last one. Raises RunError when too many in a row were skipped."""
        state, learner, job, window = self.state, self.learner, self.job, self.window
        if not window.steps:
            return
        self.window = Window(window.names, learner.accelerator.device)
        figures = window.read(learner.accelerator)
        skipped, in_a_row = learner.skip_rule.skipped.tolist()
        tokens = int(window.tokens.item())
        seconds = self.clock.lap()  # now that the device has done all steps
        state.tokens += tokens
        mfu = job.utilisation and round(job.utilisation.of(tokens / seconds), 4)
        saving, self.clock.saving = self.clock.saving, 0.0
        record = {
            "event": "train",
            "step": state.step,
            "epoch": round(self.batches.epoch_at(state.step), 4),
            "lr": learner.optimizer.param_groups[0]["lr"],
            **figures,
            **(learner.masks.figures() if learner.masks else {}),
            **({"on_policy": own.read(learner.accelerator)} if (own := self.step.on_policy) else {}),
            "skipped": skipped,
            "examples_per_s": round(window.steps * self.batches.batch_size / seconds, 2),
            "tokens_per_s": round(tokens / seconds, 1),
            "mfu": mfu,
            "save_seconds": round(saving, 3),
            "tokens": state.tokens,
        }
        self.tracker.record(record)
        self._adapt_head_precision(figures["terms"])
        if state.tokens == tokens and figures["grad_norm"] == 0 and figures["loss"]:
            self.say(
                f"{job.title}: the loss has no gradient for what learns: look at its terms, and freeze, only or lora"
            )
        self._judge_left_out(in_a_row)

    def _judge_left_out(self, steps: int) -> None:
        """Raise RunError where too many steps in a row were left out, and say where the last ones of all were."""
        title, step, most = self.job.title, self.state.step, min(self.job.spec.max_skipped, self.steps)
        why = "were left out, their loss or gradient is not finite or a spike (skip_spikes)"
        line = f"{title}: the last {steps} steps up to step {step} {why}"
        if steps >= most:
            raise RunError(f"{line}; {self.writer.last_good()}. Lower lr, or check the teacher and the data")
        if steps and step == self.steps:
            self.say(f"{line}; the model is that of step {step - steps}")

    def _adapt_head_precision(self, terms: Mapping[str, float | None]) -> None:
        """Let `auto` follow the means of the last window, which are the same on every rank."""
        spec, objective = self.job.spec, self.learner.wrapper.objective
        on_gpu = self.learner.accelerator.device.type == "cuda"
        in_bf16 = "bf16" in (spec.precision, spec.weights)
        if on_gpu and in_bf16 and spec.head_precision == "auto" and objective.kind.vocabulary:
            if line := objective.adapt_head_precision(terms):
                self.say(f"{self.job.title}: after step {self.state.step} {line}")
            self.state.head_precision = objective.head_precision

    def measure(self) -> bool:
        """Evaluate and record where due; returns True, with nothing recorded, where a rank was asked to stop."""
        job, state = self.job, self.state
        due = state.step == self.steps or (state.step > 0 and _due(job.spec.evaluate_every, state.step))
        if self.evaluate is None or not due or state.evaluated == state.step:
            return False
        with self.watchdog.guard("evaluation"), self.clock.paused(), self.learner.for_evaluation() as model:
            metrics = self.evaluate(model, self.stop.asked)
        seconds = round(self.clock.last, 3)
        if self.anyone_stopped():
            return True
        state.evaluated = state.step
        self.tracker.record({"event": "evaluate", "step": state.step, "metrics": dict(metrics), "seconds": seconds})
        value, best = metrics[job.spec.keep_best] if job.spec.keep_best else None, state.best
        if value is not None and (best is None or (value > best if job.higher_is_better else value < best)):
            state.best, self.improved = value, True
        return False

    def save(self, *, newest: bool) -> None:
        """Have a checkpoint written: as the `newest` one, as the best one where it is that, or not at all. Collective.

        It is published when `settle` comes back. After the first step, memory for the copies is seen to. No record
        counts the seconds that training stands still: for the copy, and for what is left to write of the one before.
        """
        if newest or self.improved:
            with self.clock.paused():
                self._hand_over(newest)
            self.clock.saving += self.clock.last
        elif self.state.step and not self.writer.prepared:
            with self.clock.paused():
                self.writer.prepare(self.learner.contents()[0], whole=self.learner.saves_whole)

    def _hand_over(self, newest: bool) -> None:
        self.settle()
        # The best one first: after a kill between both, training comes by this evaluation again.
        best = Checkpoints(self.job.folder / CHECKPOINTS / "best", self.job.made_from, self.say, keep=1)
        places = [best] * self.improved + [self.writer.checkpoints] * newest
        self.improved = False
        with self.watchdog.guard("save"):
            tensors, self.state.numbers = self.learner.contents()
            self.writer.save(places, self.state, tensors, whole=self.learner.saves_whole)

    def settle(self) -> None:
        """Wait until the checkpoint in flight is published. Raises RunError where it could not be. Collective."""
        if self.writer.flight is not None:
            with self.watchdog.guard("publication"):
                seconds = self.writer.settle()
            self.watchdog.note("publication", seconds)


def _due(every: int, step: int) -> bool:
    """Tell whether something done every so many steps (0: never) is done after this one."""
    return every > 0 and step % every == 0

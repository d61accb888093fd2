"""Set a training up: its Accelerator, its length and its learner."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from distill.errors import InputError
from distill.models.family import layers_of
from distill.models.forward import Batch
from distill.models.trainable import freeze
from distill.ranks import check_launch, process_state
from distill.recipe.schema import Optimization
from distill.training.deepspeed import ZeroLearner, configure_deepspeed
from distill.training.ema import Ema
from distill.training.learner import SHARDING, Learner, gradient_checkpointing
from distill.training.model import Constraint, DistillModel, Loss
from distill.training.optim import make_optimizer
from distill.training.skip import SkipRule

Constrain = Callable[[Any], Constraint | None]
"""(student, frozen parameters set) -> what must hold of its weights after every step."""


class Batches(Protocol):
    """Batches as the loop uses them (`distill.data.TrainingBatches`)."""

    @property
    def batch_size(self) -> int:
        """Examples per step over all ranks."""

    @property
    def micro_batch_size(self) -> int:
        """Examples per forward pass."""

    def micro_batches_per_step(self) -> int:
        """Forward passes per optimizer step over all ranks."""

    def steps_for(self, epochs: float) -> int:
        """Optimizer steps in so many epochs."""

    def steps_for_tokens(self, tokens: int) -> int:
        """Optimizer steps until so many tokens have been seen."""

    def epoch_at(self, step: int) -> float:
        """Epochs done after `step` steps."""

    def stream(
        self, start: int, stop: int, rank: int, world: int, workers: int = 0
    ) -> Iterator[list[tuple[int, Batch]]]:
        """Yield this rank's (number within the step, micro-batch) pairs, step by step."""


def make_accelerator(
    spec: Optimization, batches: Batches, trackers: Sequence[str] = (), folder: Path | None = None
) -> Accelerator:
    """Make the Accelerator of one training, which may have been started by `accelerate launch`.

    Args:
        spec: The recipe's section.
        batches: The micro-batches of every step.
        trackers: Names that Accelerate's `log_with` knows.
        folder: Where trackers that write files do so.

    Raises:
        InputError: The launch is not what it seems, or the ranks cannot share the step evenly.
    """
    state = process_state()
    check_launch(state.num_processes, state.device.type)
    world = state.num_processes
    count = batches.micro_batches_per_step()
    if count % world:
        raise InputError(
            f"training: a step has {count} micro-batches (batch_size / micro_batch_size), "
            f"which {world} processes cannot share evenly; lower micro_batch_size"
        )
    if spec.precision == "fp16" and state.device.type == "cpu":
        raise InputError("training.precision: fp16 needs a GPU; use bf16 or fp32")
    # Accelerate keeps one precision per process; the teacher's fit and the student's training may differ.
    AcceleratorState._reset_state()
    # Windows are closed by count alone: the stream of batches has no end for Accelerate to see.
    plugin = GradientAccumulationPlugin(num_steps=count // world, sync_with_dataloader=False)
    precision = "no" if spec.precision == "fp32" else spec.precision
    own = {"log_with": list(trackers), "project_dir": folder} if trackers else {}
    accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_plugin=plugin, **own)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        configure_deepspeed(accelerator, spec, batches.batch_size // count)
    return accelerator


def horizon(spec: Optimization, batches: Batches) -> int:
    """Count the optimizer steps of the whole training."""
    if spec.steps is not None:
        return spec.steps
    if spec.tokens is not None:
        return batches.steps_for_tokens(spec.tokens)
    assert spec.epochs is not None, "load_recipe checks that a length is given"
    return batches.steps_for(spec.epochs)


def make_learner(
    student: Any,
    objective: Loss,
    spec: Optimization,
    constrain: Constrain | None,
    accelerator: Accelerator,
    found: Path | None = None,
) -> Learner:
    """Freeze, wrap and prepare a student.

    Args:
        student: A transformers model on the CPU.
        objective: What is minimised.
        spec: The recipe's section.
        constrain: Makes what must hold of the weights after every step, from a student whose frozen parameters are set.
        accelerator: From `make_accelerator`.
        found: The checkpoint that it continues from; None: it starts with the student's weights.

    Raises:
        InputError: A name pattern matches nothing.
    """
    freeze(student, spec.freeze, spec.only)
    constraint = constrain(student) if constrain else None
    kind = ZeroLearner if accelerator.distributed_type == DistributedType.DEEPSPEED else Learner
    trained = copy.deepcopy(student) if accelerator.distributed_type in SHARDING else student
    if spec.gradient_checkpointing:
        gradient_checkpointing(trained, "enable")({"use_reentrant": False})
    if spec.compile:
        for layer in layers_of(trained):
            layer.forward = torch.compile(layer.forward)  # not the module: hooks on it stay outside of the graph
    wrapper = DistillModel(trained, objective).train()
    optimizer = make_optimizer(wrapper, spec)
    kind.before_prepare(wrapper, constraint, found)
    model, prepared = accelerator.prepare(wrapper, optimizer)
    if constraint is not None:
        constraint.follow(wrapper.student)
        if found is None:
            constraint.after_step(0)
    ema = Ema(wrapper, spec.ema) if spec.ema is not None else None
    skip_rule = SkipRule(spec.skip_spikes, accelerator.device)
    learner = kind(accelerator, student, model, wrapper, prepared, optimizer, skip_rule, ema, constraint, spec)
    if found is not None:
        learner.load(found)
    return learner

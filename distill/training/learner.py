"""What learns, with everything that a checkpoint holds of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import StateDictType

from distill.errors import InputError
from distill.models.dtensor import full_tensor
from distill.models.family import layers_of
from distill.models.trainable import freeze
from distill.recipe.schema import Optimization
from distill.training.ema import Ema
from distill.training.model import Constraint, DistillModel, Loss
from distill.training.optim import make_optimizer
from distill.training.shards import Parts, Place, read
from distill.training.skip import SkipRule
from distill.training.state import (
    load_model,
    load_optimizer,
    load_scaler,
    optimizer_tensors,
    own_tensors,
    scaler_tensors,
)

SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)
"""Where each process holds a part of the weights."""


@dataclass
class Learner:
    """The student under training."""

    accelerator: Accelerator
    student: Any
    """The transformers model that was handed in; where weights are sharded a copy of it is trained."""
    model: nn.Module
    """The prepared module; always called through this wrapper."""
    wrapper: DistillModel
    """The same module, unwrapped."""
    prepared: Any
    optimizer: torch.optim.Optimizer
    health: SkipRule
    average: Ema | None
    constraint: Constraint | None
    spec: Optimization

    def backward(self, share: Tensor) -> None:
        """Add the gradient of one micro-batch's share of the loss [], inside `accelerator.accumulate`."""
        accelerator = self.accelerator
        # Undoes DDP's mean and Accelerate's division.
        accelerator.backward(share * (accelerator.num_processes * accelerator.gradient_accumulation_steps))

    def step(self, step: int, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip, take the optimizer's step unless it must be left out, then what follows from the new weights.

        Args:
            step: Steps done, this one included.
            loss: Of the whole step, the same on every process [].

        Returns:
            Norm of the whole gradient [], and 1.0 where the step was left out, else 0.0 [].
        """
        if self.constraint:
            self.constraint.before_step()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.spec.max_grad_norm or math.inf)
        norm = full_tensor(norm.detach())
        bad = self.health.judge(loss, norm)
        self._update(bad)
        if self.constraint:
            self.constraint.after_step(step)
        if self.average:
            self.average.update(step, bad)
        return norm, bad

    def _update(self, bad: Tensor) -> None:
        if self._decides_itself:
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # the fused kernels look at it on the device
            self.prepared.step()
        elif not bad.item():
            self.prepared.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # lowers the scale after an overflow
        self.prepared.zero_grad()

    @property
    def _decides_itself(self) -> bool:
        """Whether the optimizer leaves out a step without the host's waiting for the device."""
        fused = bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))
        return fused and not self.sharded and self.accelerator.scaler is None

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the weights."""
        return self.accelerator.distributed_type in SHARDING

    @contextmanager
    def measured(self) -> Iterator[Any]:
        """The student in eval mode, with the weights that would be handed on."""
        with self.average.in_place() if self.spec.ema_release and self.average else nullcontext():
            if self.spec.ema_release and self.constraint:
                self.constraint.apply()  # an average keeps traces of what is masked by now
            self.wrapper.eval()
            if self.sharded:
                self._fill_student(self.accelerator.device)
            try:
                yield self.student
            finally:
                self.wrapper.train()

    def finish(self) -> None:
        """Leave the student in eval mode with the final weights."""
        if self.spec.ema_release and self.average:
            self.average.put()
            if self.constraint:
                self.constraint.apply()
        self.wrapper.eval()
        if self.sharded:
            self._fill_student(torch.device("cpu"))
        if self.spec.gradient_checkpointing and not self.sharded:
            _checkpointing(self.student, "disable")()
        for layer in layers_of(self.student):
            vars(layer).pop("forward", None)  # compiled

    def _fill_student(self, device: torch.device) -> None:
        """Put the weights together in the student itself; every process takes part."""
        own = {name.removeprefix("student."): full_tensor(tensor) for name, tensor in self.weights().items()}
        expected = own_tensors(self.student)
        load_model(self.student.to(device).eval(), {name: own[name] for name in expected})

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers of student and projections; where processes hold shards, those."""
        return own_tensors(self.wrapper)

    def moments(self) -> dict[str, Tensor]:
        """What the optimizer keeps of each parameter; where processes hold shards, those."""
        return optimizer_tensors(self.wrapper, self.optimizer)

    @property
    def saves_shards(self) -> bool:
        """Whether each process writes what it holds itself (`fsdp_state_dict_type: SHARDED_STATE_DICT`)."""
        if self.accelerator.distributed_type != DistributedType.FSDP:
            return False
        return bool(self.accelerator.state.fsdp_plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a checkpoint holds; where weights are sharded, every process must ask for it.

        Whole, but where each process writes what it holds itself.
        """
        parts = {
            "model": self.weights(),
            "optimizer": self.moments(),
            "health": self.health.tensors(),
            "average": self.average.tensors() if self.average else {},
            "constraint": self.constraint.tensors() if self.constraint else {},
            "scaler": scaler_tensors(self.accelerator.scaler),
        }
        if self.saves_shards:
            return parts
        return {name: {key: full_tensor(tensor) for key, tensor in tensors.items()} for name, tensors in parts.items()}

    def places(self) -> Place:
        """Which parameter a tensor in a checkpoint belongs to, and is sharded like."""
        named = own_tensors(self.wrapper)

        def place(part: str, name: str) -> Tensor | None:
            if part == "optimizer":
                name = name.rpartition("/")[0]
            return named.get(f"student.{name}" if part == "constraint" else name)

        return place

    def load(self, parts: Parts) -> None:
        """Continue from what `parts` gave."""
        load_model(self.wrapper, parts["model"])
        load_optimizer(self.wrapper, self.optimizer, parts.get("optimizer", {}))
        self.health.load(parts["health"])
        if self.average:
            self.average.load(parts["average"])
        if self.constraint:
            self.constraint.load(parts.get("constraint", {}))
        load_scaler(self.accelerator.scaler, parts.get("scaler", {}))


def make_learner(
    student: Any,
    objective: Loss,
    spec: Optimization,
    constraint: Constraint | None,
    accelerator: Accelerator,
    found: Path | None = None,
) -> Learner:
    """Freeze, wrap and prepare a student.

    Args:
        student: A transformers model on the CPU.
        objective: What is minimised.
        spec: The recipe's section.
        constraint: What must hold of the weights after every step.
        accelerator: From `make_accelerator`.
        found: The checkpoint that it continues from; None: it starts with the student's weights.

    Raises:
        InputError: A name pattern matches nothing.
    """
    freeze(student, spec.freeze, spec.only)
    sharded, zero = accelerator.distributed_type in SHARDING, accelerator.distributed_type == DistributedType.DEEPSPEED
    if zero and constraint is not None:
        raise InputError("student.mask does not go with DeepSpeed: launch it with DDP or FSDP2")
    trained = copy.deepcopy(student) if sharded else student
    if spec.gradient_checkpointing:
        _checkpointing(trained, "enable")({"use_reentrant": False})
    if spec.compile:
        for layer in layers_of(trained):
            layer.forward = torch.compile(layer.forward)  # not the module: hooks on it stay outside of the graph
    wrapper = DistillModel(trained, objective).train()
    optimizer = make_optimizer(wrapper, spec)
    if zero and found is not None:
        load_model(wrapper, read(found)["model"])  # before the engine makes its own copies
    model, prepared = accelerator.prepare(wrapper, optimizer)
    if constraint is not None:
        constraint.follow(wrapper.student)
        if found is None:
            constraint.after_step(0)
    average = Ema(wrapper, spec.ema) if spec.ema is not None else None
    health = SkipRule(spec.skip_spikes, accelerator.device)
    kind = Learner
    if zero:
        from distill.training.deepspeed import ZeroLearner as kind
    learner = kind(accelerator, student, model, wrapper, prepared, optimizer, health, average, constraint, spec)
    if found is not None:
        learner.load(read(found, learner.places()))
    return learner


def _checkpointing(student: Any, what: str) -> Any:
    # Newer versions of transformers warn about the old name.
    new = f"activation_checkpointing_{what}"
    return getattr(student, new if hasattr(student, new) else f"gradient_checkpointing_{what}")

"""What learns, with everything that a checkpoint holds of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from distill.errors import InputError
from distill.models.layout import layers_of
from distill.recipe.schema import Optimization
from distill.training.average import Average
from distill.training.checkpoint import Parts
from distill.training.health import Health
from distill.training.model import Constraint, DistillModel, Loss
from distill.training.optimizers import make_optimizer
from distill.training.setup import freeze
from distill.training.tensors import load_model, load_optimizer, optimizer_tensors, own_tensors, whole

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
    health: Health
    average: Average | None
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
        norm = whole(norm.detach())
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
        own = {name: tensor for name, tensor in self.weights().items() if name.startswith("student.")}
        load_model(self.student.to(device).eval(), {name.removeprefix("student."): own[name] for name in own})

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers of student and projections, whole."""
        return {name: whole(tensor) for name, tensor in own_tensors(self.wrapper).items()}

    def moments(self) -> dict[str, Tensor]:
        """What the optimizer keeps of each parameter, whole."""
        return {name: whole(tensor) for name, tensor in optimizer_tensors(self.wrapper, self.optimizer).items()}

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a checkpoint holds, whole; where weights are sharded, every process must ask for it."""
        parts = {
            "model": self.weights(),
            "optimizer": self.moments(),
            "health": self.health.tensors(),
            "average": self.average.tensors() if self.average else {},
            "constraint": self.constraint.tensors() if self.constraint else {},
        }
        return {name: {key: whole(tensor) for key, tensor in tensors.items()} for name, tensors in parts.items()}

    def load(self, parts: Parts) -> None:
        """Continue from what `parts` gave."""
        load_model(self.wrapper, parts["model"])
        load_optimizer(self.wrapper, self.optimizer, parts.get("optimizer", {}))
        self.health.load(parts["health"])
        if self.average:
            self.average.load(parts["average"])
        if self.constraint:
            self.constraint.load(parts.get("constraint", {}))


def make_learner(
    student: Any,
    objective: Loss,
    spec: Optimization,
    constraint: Constraint | None,
    accelerator: Accelerator,
    found: Parts | None = None,
) -> Learner:
    """Freeze, wrap and prepare a student.

    Args:
        student: A transformers model on the CPU.
        objective: What is minimised.
        spec: The recipe's section.
        constraint: What must hold of the weights after every step.
        accelerator: From `make_accelerator`.
        found: What a checkpoint of this training holds; None: it starts with the student's weights.

    Raises:
        InputError: A name pattern matches nothing, or the constraint needs whole weights and gets shards.
    """
    freeze(student, spec.freeze, spec.only)
    sharded, zero = accelerator.distributed_type in SHARDING, accelerator.distributed_type == DistributedType.DEEPSPEED
    if sharded and constraint is not None:
        raise InputError("student.mask looks at whole weights: launch it with DDP, not with FSDP or DeepSpeed")
    trained = copy.deepcopy(student) if sharded else student
    if spec.gradient_checkpointing:
        _checkpointing(trained, "enable")({"use_reentrant": False})
    if spec.compile:
        for layer in layers_of(trained):
            layer.forward = torch.compile(layer.forward)  # not the module: hooks on it stay outside of the graph
    wrapper = DistillModel(trained, objective).train()
    optimizer = make_optimizer(wrapper, spec)
    if zero and found is not None:
        load_model(wrapper, found["model"])  # before the engine makes its own copies
    model, prepared = accelerator.prepare(wrapper, optimizer)
    if constraint is not None and found is None:
        constraint.after_step(0)
    average = Average(wrapper, spec.ema) if spec.ema is not None else None
    health = Health(spec.skip_spikes, accelerator.device)
    kind = Learner
    if zero:
        from distill.training.zero import ZeroLearner as kind
    learner = kind(accelerator, student, model, wrapper, prepared, optimizer, health, average, constraint, spec)
    if found is not None:
        learner.load(found)
    return learner


def _checkpointing(student: Any, what: str) -> Any:
    # Newer versions of transformers warn about the old name.
    new = f"activation_checkpointing_{what}"
    return getattr(student, new if hasattr(student, new) else f"gradient_checkpointing_{what}")

"""The learner: student, optimizer and all else that a checkpoint holds, behind one step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import StateDictType

from distill.models.dtensor import full_tensor
from distill.recipe.schema import Optimization
from distill.training.checkpoint import state_of
from distill.training.ema import Ema
from distill.training.masters import Masters
from distill.training.model import DistillModel
from distill.training.shards import FindParameter, TensorsByFile, read
from distill.training.skip import SkipRule
from distill.training.state import Numbers, group_numbers, load_optimizer, load_tensors, named_moments, own_tensors

if TYPE_CHECKING:
    from distill.student.masks.masks import Masks
    from distill.training.lora import Adapters

SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)
"""Kinds of training in which each rank holds a shard of the weights."""


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
    skip_rule: SkipRule
    ema: Ema | None
    masks: Masks | None
    spec: Optimization
    masters: Masters | None = None
    """Where the weights are held in bf16."""
    adapters: Adapters | None = None
    """Where adapters are trained in place of the weights."""

    @staticmethod
    def before_prepare(_wrapper: DistillModel, _masks: Masks | None, _found: Path | None) -> None:
        """Do what must happen to the module before Accelerate wraps it; nothing here."""

    def backward(self, share: Tensor) -> None:
        """Add the gradient of one micro-batch's share of the loss [], inside `accelerator.accumulate`."""
        accelerator = self.accelerator
        # Undoes DDP's mean and Accelerate's division.
        accelerator.backward(share * (accelerator.num_processes * accelerator.gradient_accumulation_steps))

    def step(self, step: int, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip, take the optimizer's step unless it must be skipped, then update masks and EMA.

        Args:
            step: Steps done, this one included.
            loss: Of the whole step, the same on every rank [].

        Returns:
            Norm of the whole gradient [], and 1.0 where the step was skipped, else 0.0 [].
        """
        if self.masks:
            self.masks.before_step()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.spec.max_grad_norm or math.inf)
        norm = full_tensor(norm.detach())
        bad = self.skip_rule.should_skip(loss, norm)
        self._update(bad)
        if self.masks:
            self.masks.after_step(step)
        if self.ema:
            self.ema.update(step, bad)
        return norm, bad

    def _update(self, bad: Tensor) -> None:
        # A fused optimizer skips on the device: the host does not wait for the decision.
        fused = bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))
        if fused and not self.sharded and self.accelerator.scaler is None:
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # the fused kernels look at it on the device
            self.prepared.step()
        elif not bad.item():
            self.prepared.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # lowers the scale after an overflow
        self.prepared.zero_grad()

    @property
    def sharded(self) -> bool:
        """True where each rank holds a shard of the weights."""
        return self.accelerator.distributed_type in SHARDING

    @contextmanager
    def for_evaluation(self) -> Iterator[Any]:
        """Put the student into eval mode, with the weights that would be handed on."""
        ema = self.ema if self.spec.ema_release else None
        with ema.swapped_in() if ema else nullcontext():
            self._to_eval_mode(self.accelerator.device)
            try:
                yield self.student
            finally:
                self.wrapper.train()

    def finish(self) -> None:
        """Leave the student in eval mode with the final weights, in fp32, adapters merged into them."""
        if self.masters:
            self.masters.restore(self.student)
        if self.spec.ema_release and self.ema:
            self.ema.copy_to_model()
        self._to_eval_mode(torch.device("cpu"))
        if self.spec.gradient_checkpointing and not self.sharded:
            gradient_checkpointing(self.student, "disable")()
        if self.adapters:
            self.adapters.merge()

    def _to_eval_mode(self, device: torch.device) -> None:
        """Put the student, masked and with whole weights, into eval mode."""
        if self.spec.ema_release and self.masks:
            self.masks.apply()  # an average keeps traces of what is masked by now
        self.wrapper.eval()
        if self.sharded:
            self._fill_student(device)

    def _fill_student(self, device: torch.device) -> None:
        """Gather the weights into the student itself. Collective."""
        own = {name.removeprefix("student."): full_tensor(tensor) for name, tensor in self.weights().items()}
        all_weights = self.adapters is None
        expected = own_tensors(self.student, frozen=all_weights)
        load_tensors(self.student.to(device).eval(), {name: own[name] for name in expected}, frozen=all_weights)

    def weights(self) -> dict[str, Tensor]:
        """Return parameters and buffers of student and projections; shards where weights are sharded.

        Without what adapters stand in for, which is the larger part and in the folder of the start.
        """
        return own_tensors(self.wrapper, frozen=self.adapters is None)

    def moments(self) -> dict[str, Any]:
        """Return what the optimizer keeps of each parameter, tensors (shards where weights are sharded) and numbers."""
        return dict(named_moments(self.wrapper, self.optimizer))

    def contents(self) -> tuple[TensorsByFile, Numbers]:
        """Return what a checkpoint holds: the tensors as they are in training, and plain numbers.

        Collective where DeepSpeed shards the weights, which it puts together here.
        """
        moments, scaler = self.moments(), self.accelerator.scaler
        numbers = {
            "moments": {name: value for name, value in moments.items() if not isinstance(value, Tensor)},
            "groups": group_numbers(self.optimizer),
            "scaler": scaler.state_dict() if scaler is not None else {},
        }
        files = {
            "model": self.weights(),
            "optimizer": {name: value for name, value in moments.items() if isinstance(value, Tensor)},
            **{name: part.tensors() for name, part in self._parts()},
        }
        return files, numbers

    def _parts(self) -> list[tuple[str, SkipRule | Ema | Masks]]:
        """List, by the name of their file, what else has tensors of its own."""
        parts = ("skip_rule", self.skip_rule), ("ema", self.ema), ("masks", self.masks)
        return [(name, part) for name, part in parts if part is not None]

    @property
    def saves_whole(self) -> bool:
        """True where checkpoints hold whole tensors, False where each rank writes its shards."""
        fsdp = self.accelerator.distributed_type == DistributedType.FSDP
        return not fsdp or self.accelerator.state.fsdp_plugin.state_dict_type != StateDictType.SHARDED_STATE_DICT

    def parameter_of(self) -> FindParameter:
        """Return a function that finds the parameter which a tensor of a checkpoint belongs to and is sharded like."""
        named = own_tensors(self.wrapper)

        def find(file: str, name: str) -> Tensor | None:
            if file == "optimizer":
                name = name.rpartition("/")[0]
            return named.get(f"student.{name}" if file == "masks" else name)

        return find

    def load(self, checkpoint: Path) -> None:
        """Continue from a verified checkpoint, written by any number of ranks."""
        files, numbers = read(checkpoint, self.parameter_of()), state_of(checkpoint).numbers
        self.load_weights(files, numbers)
        for name, part in self._parts():
            part.load(files.get(name, {}))
        if self.accelerator.scaler is not None and numbers["scaler"]:
            self.accelerator.scaler.load_state_dict(numbers["scaler"])

    def load_weights(self, files: TensorsByFile, numbers: Numbers) -> None:
        """Restore weights and moments."""
        load_tensors(self.wrapper, files["model"], frozen=self.adapters is None)
        moments = {**files.get("optimizer", {}), **numbers["moments"]}
        load_optimizer(self.wrapper, self.optimizer, moments, numbers["groups"])


def gradient_checkpointing(student: Any, switch: str) -> Any:
    """Return the method that enables or disables it; newer versions of transformers warn about the old name."""
    new = f"activation_checkpointing_{switch}"
    return getattr(student, new if hasattr(student, new) else f"gradient_checkpointing_{switch}")

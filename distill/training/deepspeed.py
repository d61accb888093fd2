"""DeepSpeed's ZeRO-2 and ZeRO-3 behind the same learner. Run on CPU processes only, never on a GPU.

The engine flattens the trainable parameters and shards them. For checkpoints, which are those of any other training,
and for evaluations they are gathered here. The engine clips and steps at one go and tells the norm only then, so a step
is skipped where the engine calls the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from distill.errors import InputError
from distill.recipe.schema import Optimization
from distill.training.learner import Learner
from distill.training.model import Constraint, DistillModel
from distill.training.shards import TensorsByFile, read
from distill.training.skip import SkipRule
from distill.training.state import SCALAR_MARK, group_tensors, load_groups, load_model, own_tensors


def configure_deepspeed(accelerator: Accelerator, spec: Optimization, micro: int) -> None:
    """Give the launch's DeepSpeed plugin what the recipe decides: batch, accumulation and clipping.

    Raises:
        InputError: The launch or the recipe asks for something that is not done with DeepSpeed.
    """
    config = accelerator.deepspeed_plugin.deepspeed_config
    zero = config["zero_optimization"]
    if zero["stage"] not in (2, 3):
        raise InputError(f"zero_stage: {zero['stage']} shares out nothing that DDP does not; use 2 or 3")
    if any((zero.get(f"offload_{what}") or {}).get("device", "none") != "none" for what in ("optimizer", "param")):
        raise InputError("DeepSpeed's offloading is not supported: set offload_*_device: none, or use FSDP2")
    if spec.precision == "fp16":
        raise InputError("training.precision: fp16 does not go with DeepSpeed, whose loss scale no checkpoint keeps")
    if spec.ema is not None:
        raise InputError("training.ema looks at whole weights: launch it with DDP or FSDP2, not with DeepSpeed")
    config["train_micro_batch_size_per_gpu"] = micro
    config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps
    config["gradient_clipping"] = spec.max_grad_norm or 0.0
    # transformers would share out every model that is loaded from here on, teacher and evaluated arms included.
    unset_hf_deepspeed_config()


@dataclass
class ZeroLearner(Learner):
    """A student whose weights, gradients and moments the engine holds."""

    @staticmethod
    def before_prepare(wrapper: DistillModel, constraint: Constraint | None, found: Path | None) -> None:
        """Load the weights of a checkpoint before the engine makes its own copies. Raises InputError with masks."""
        if constraint is not None:
            raise InputError("student.mask does not go with DeepSpeed: launch it with DDP or FSDP2")
        if found is not None:
            load_model(wrapper, read(found)["model"])

    def __post_init__(self) -> None:
        self.engine: Any = self.model
        self.optimizer = cast(torch.optim.Optimizer, self.engine.basic_optimizer)
        self.gate = StepGate(self.engine, self.skip_rule)
        self._keep_head()
        self._create_moments()
        self._scalars = self._find_scalars()
        for moment in self._scalars:
            self._set_scalar(moment, torch.zeros(()))
        self.gate.close()

    def backward(self, share: Tensor) -> None:
        """See `Learner`; the engine takes the mean over processes and is told not to divide by anything else."""
        self.engine.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
        self.engine.backward(share * self.accelerator.num_processes, scale_wrt_gas=False)

    def step(self, step: int, loss: Tensor) -> tuple[Tensor, Tensor]:
        """See `Learner`."""
        return self.gate.step(self.engine.step, loss)

    def load_weights(self, files: TensorsByFile) -> None:
        """Restore the moments; the weights are there already, as the engine made its copies of them."""
        trained = dict(self._trained())
        for name, tensor in load_groups(self.optimizer, files.get("optimizer", {})).items():
            parameter, moment = name.rsplit("/", 1)
            if moment.removesuffix(SCALAR_MARK) in self._scalars:
                self._set_scalar(moment, tensor)
            else:
                self._set_moment(trained[parameter], tensor, moment)

    def weights(self) -> dict[str, Tensor]:
        """See `Learner`; what does not learn is what it was."""
        from deepspeed.utils import safe_get_full_fp32_param

        before = {f"student.{name}": tensor for name, tensor in own_tensors(self.student).items()}
        parameters = dict(self.wrapper.named_parameters())
        trained = dict(self._trained())
        tensors = {}
        for name, tensor in own_tensors(self.wrapper).items():
            if name in trained:
                tensors[name] = safe_get_full_fp32_param(trained[name]).cpu()
            else:
                tensors[name] = before[name] if name in parameters else tensor
        return tensors

    def moments(self) -> dict[str, Tensor]:
        """See `Learner`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        flat = next(iter(self.optimizer.state.values()))
        tensors = {}
        for name, parameter in self._trained():
            for moment, value in flat.items():
                if moment not in self._scalars:
                    tensors[f"{name}/{moment}"] = safe_get_full_optimizer_state(parameter, moment).cpu()
                elif isinstance(value, Tensor):
                    tensors[f"{name}/{moment}"] = value.clone()  # one for all, and a file holds no tensor twice
                else:
                    tensors[f"{name}/{moment}{SCALAR_MARK}"] = torch.tensor(value, dtype=torch.float64)
        return tensors | group_tensors(self.optimizer)

    def _keep_head(self) -> None:
        """Have ZeRO-3 put the output head together for the whole forward pass: the loss reads it, not the head."""
        from deepspeed.runtime.zero import register_external_parameter

        head = self.wrapper.student.get_output_embeddings()
        for parameter in head.parameters() if head is not None else ():
            if hasattr(parameter, "ds_id"):
                register_external_parameter(self.wrapper, parameter)

    def _trained(self) -> Iterator[tuple[str, Any]]:
        return ((name, own) for name, own in self.wrapper.named_parameters() if own.requires_grad)

    def _create_moments(self) -> None:
        """Have the optimizer make its state, which it does in its first step: one without gradient at rate 0."""
        zero, rates = self.engine.optimizer, [group["lr"] for group in self.optimizer.param_groups]
        flats = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for flat in flats:
            flat.grad = torch.zeros_like(flat)
        for number in range(len(flats)):
            zero._optimizer_step(number)
        if hasattr(zero, "_hp_optimizer_states_linked"):
            # ZeRO-2 links parameters and state when the first part is done; the state of the others came later.
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
        for flat in flats:
            flat.grad = None
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _find_scalars(self) -> set[str]:
        """Find the moments that are one number for all, such as the step count; the others are one per weight."""
        found = set()
        for flat, state in self.optimizer.state.items():
            for moment, value in state.items():
                if not isinstance(value, Tensor) or value.numel() == 1 != flat.numel():
                    found.add(moment)
                elif value.shape != flat.shape:
                    raise InputError(
                        f"optimizer: {self.spec.optimizer} needs whole matrices, and DeepSpeed flattens them"
                    )
        return found

    def _set_scalar(self, moment: str, value: Tensor) -> None:
        name = moment.removesuffix(SCALAR_MARK)
        for state in self.optimizer.state.values():
            if isinstance(state[name], Tensor):
                state[name].fill_(value.item())
            else:
                state[name] = type(state[name])(value.item())

    def _set_moment(self, parameter: Any, value: Tensor, moment: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        value = value.to(self.accelerator.device)
        if not hasattr(parameter, "ds_tensor"):
            safe_set_full_optimizer_state(parameter, value, moment)
            return
        # Not the setter of whole tensors: it does not know that the last process's part is padded.
        size, accelerator = parameter.ds_tensor.numel(), self.accelerator
        padded = functional.pad(value.flatten(), (0, size * accelerator.num_processes - value.numel()))
        safe_set_local_optimizer_state(parameter, padded.narrow(0, size * accelerator.process_index, size), moment)


class StepGate:
    """Decides on skipping before the optimizer's step, which the engine takes once per part of the weights."""

    def __init__(self, engine: Any, skip_rule: SkipRule):
        self.engine, self.skip_rule = engine, skip_rule
        self.open = True
        self.loss = torch.zeros(())
        self.verdict: tuple[Tensor, Tensor] | None = None
        self.take = engine.basic_optimizer.step
        engine.basic_optimizer.step = self._step

    def close(self) -> None:
        """Decide on each step from here on."""
        self.open = False

    def step(self, step: Any, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step of the engine; returns (norm [], 1.0 where it was skipped [])."""
        self.loss, self.verdict = loss, None
        step()
        # Of a gradient that is not finite the engine knows itself, and does not come here.
        return self.verdict or self._judge(float("inf"))

    def _step(self, *arguments: Any, **options: Any) -> Any:
        if not self.open:
            norm = float(self.engine.optimizer._global_grad_norm)
            _, bad = self.verdict = self.verdict or self._judge(norm)
            if bad.item():
                return None
        return self.take(*arguments, **options)

    def _judge(self, norm: float) -> tuple[Tensor, Tensor]:
        # A negative norm is DeepSpeed's sign for one that is not finite.
        found = torch.tensor(norm if norm >= 0 else float("inf"), device=self.loss.device)
        return found, self.skip_rule.should_skip(self.loss, found)

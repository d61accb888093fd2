"""DeepSpeed's ZeRO-2 and ZeRO-3 behind the same learner. Run on CPU processes only, never on a GPU.

The engine flattens the trainable parameters and shards them. For checkpoints, which are those of any other training,
and for evaluations they are gathered here. The engine clips and steps at one go and tells the norm only then, so a step
is skipped where the engine calls the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from distill.errors import InputError
from distill.recipe.schema import Optimization
from distill.training.learner import Learner
from distill.training.model import DistillModel
from distill.training.shards import TensorsByFile, read
from distill.training.state import Numbers, load_tensors, own_tensors

if TYPE_CHECKING:
    from distill.student.masks.masks import Masks


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
    def before_prepare(wrapper: DistillModel, masks: Masks | None, found: Path | None) -> None:
        """Load the weights of a checkpoint before the engine makes its own copies. Raises InputError with masks."""
        if masks is not None:
            raise InputError("student.mask does not go with DeepSpeed: launch it with DDP or FSDP2")
        if found is not None:
            load_tensors(wrapper, read(found)["model"])

    def __post_init__(self) -> None:
        self.engine: Any = self.model
        self.optimizer = cast(torch.optim.Optimizer, self.engine.basic_optimizer)
        self._keep_head()
        self._create_moments()
        self._scalars = self._find_scalars()
        for moment in self._scalars:
            self._set_scalar(moment, 0)
        self.loss, self.verdict = torch.zeros(()), cast("tuple[Tensor, Tensor] | None", None)
        self.take_step = self.optimizer.step
        self.optimizer.step = self._step_unless_skipped  # type: ignore[method-assign]

    def backward(self, share: Tensor) -> None:
        """See `Learner`; the engine takes the mean over processes and is told not to divide by anything else."""
        self.engine.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
        self.engine.backward(share * self.accelerator.num_processes, scale_wrt_gas=False)

    def step(self, step: int, loss: Tensor) -> tuple[Tensor, Tensor]:
        """See `Learner`."""
        self.loss, self.verdict = loss, None
        self.engine.step()
        # Of a gradient that is not finite the engine knows itself, and does not call the optimizer.
        return self.verdict or self._judge(float("inf"))

    def _step_unless_skipped(self, *arguments: Any, **options: Any) -> Any:
        """Decide before the optimizer's step, which the engine takes once per part of the weights."""
        norm = float(self.engine.optimizer._global_grad_norm)
        _, bad = self.verdict = self.verdict or self._judge(norm)
        return None if bad.item() else self.take_step(*arguments, **options)

    def _judge(self, norm: float) -> tuple[Tensor, Tensor]:
        # A negative norm is DeepSpeed's sign for one that is not finite.
        found = torch.tensor(norm if norm >= 0 else float("inf"), device=self.loss.device)
        return found, self.skip_rule.should_skip(self.loss, found)

    def load_weights(self, files: TensorsByFile, numbers: Numbers) -> None:
        """Restore the moments; the weights are there already, as the engine made its copies of them."""
        trained = dict(self._trained())
        for name, value in {**files.get("optimizer", {}), **numbers["moments"]}.items():
            parameter, moment = name.rsplit("/", 1)
            if moment in self._scalars:
                self._set_scalar(moment, value)
            else:
                self._set_moment(trained[parameter], value, moment)
        for group, own in zip(self.optimizer.param_groups, numbers["groups"], strict=True):
            group |= own

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

    def moments(self) -> dict[str, Any]:
        """See `Learner`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        moments: dict[str, Any] = {}
        for name, parameter in self._trained():
            for moment, value in next(iter(self.optimizer.state.values())).items():
                if moment not in self._scalars:
                    value = safe_get_full_optimizer_state(parameter, moment).cpu()
                elif isinstance(value, Tensor):
                    value = value.clone()  # one for all, and a file holds no tensor twice
                moments[f"{name}/{moment}"] = value
        return moments

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
        zero = self.engine.optimizer
        flats = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0  # the loop writes it before each step
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

    def _set_scalar(self, moment: str, value: Any) -> None:
        for state in self.optimizer.state.values():
            if isinstance(state[moment], Tensor):
                state[moment].fill_(float(value))
            else:
                state[moment] = type(state[moment])(value)

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

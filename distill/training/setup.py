"""Set a training up: its Accelerator, its length and its learner."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor

from distill.errors import InputError
from distill.models.quantised import import_bitsandbytes
from distill.models.sentence import unused_parameters
from distill.models.trainable import freeze
from distill.ranks import process_state
from distill.recipe.schema import Optimization, Training
from distill.training.deepspeed import ZeroLearner, configure_deepspeed
from distill.training.ema import Ema
from distill.training.learner import SHARDING, Learner, gradient_checkpointing
from distill.training.masters import Masters
from distill.training.model import DistillModel
from distill.training.optim import make_optimizer
from distill.training.skip import SkipRule

if TYPE_CHECKING:
    from distill.data import TrainingBatches
    from distill.losses import Objective
    from distill.student.masks.masks import Masks

Constrain = Callable[[Any], "Masks"]
"""(student, frozen parameters set) -> the masks that hold after every step."""


def deal_out(spec: Optimization, key: str = "training") -> tuple[int, int]:
    """Compute (examples per forward pass, forward passes of this rank per step) for the ranks that there are.

    Raises:
        InputError: The ranks cannot share the step evenly; names the section `key`.
    """
    world = process_state().num_processes
    micro = spec.micro_batch_size or max(1, spec.batch_size // world)
    count = -(-spec.batch_size // micro)
    if count % world:
        raise InputError(
            f"{key}: a step has {count} micro-batches (batch_size / micro_batch_size), "
            f"which {world} processes cannot share evenly; lower micro_batch_size"
        )
    return micro, count // world


def make_accelerator(spec: Training, folder: Path) -> Accelerator:
    """Make the Accelerator of one training; trackers that write files do so in `folder`."""
    micro, passes = deal_out(spec)
    # Accelerate keeps one precision per process; the teacher's fit and the student's training may differ. What the
    # process is goes with it: where an Accelerator before has put "FSDP" there, the next would lose its plugin. It is
    # found out anew from the launch; the connection to the other ranks stays.
    AcceleratorState._reset_state(reset_partial_state=True)
    # Windows are closed by count alone: the stream of batches has no end for Accelerate to see.
    plugin = GradientAccumulationPlugin(num_steps=passes, sync_with_dataloader=False)
    precision = "no" if spec.precision == "fp32" else spec.precision
    own = {"log_with": list(spec.trackers), "project_dir": folder} if spec.trackers else {}
    accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_plugin=plugin, **own)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        configure_deepspeed(accelerator, spec, micro)
    return accelerator


def horizon(spec: Optimization, batches: TrainingBatches) -> int:
    """Count the optimizer steps of the whole training."""
    if spec.steps is not None:
        return spec.steps
    if spec.tokens is not None:
        return batches.steps_for_tokens(spec.tokens)
    assert spec.epochs is not None, "load_recipe checks that a length is given"
    return batches.steps_for(spec.epochs)


def check_launch_keeps(spec: Optimization, launch: DistributedType | None = None, key: str = "training") -> None:
    """Refuse kinds of launch that cannot hold what the recipe asks for.

    Args:
        spec: The section.
        launch: How the weights are shared out; None: as the environment of the launcher says.
        key: The section's name.

    Raises:
        InputError: With the fix.
    """
    asked = {kind: os.environ.get(f"ACCELERATE_USE_{kind.value}", "").lower() in ("1", "true") for kind in SHARDING}
    for kind in [launch] if launch is not None else [kind for kind, given in asked.items() if given]:
        if kind not in SHARDING:
            continue
        fix = "launch it with DDP or one process"
        if spec.weights == "bf16":
            raise InputError(f"{key}.weights: bf16 does not go with {kind.value}, which shards fp32 weights; {fix}")
        if spec.optimizer == "adamw_8bit":
            raise InputError(f"{key}.optimizer: adamw_8bit does not go with {kind.value}, which shards moments; {fix}")
        if isinstance(spec, Training) and spec.on_policy is not None:
            raise InputError(
                f"{key}.on_policy does not go with {kind.value}: to write, a rank needs all weights; {fix}"
            )
        if spec.lora is not None and kind == DistributedType.DEEPSPEED:
            raise InputError(f"{key}.lora does not go with DeepSpeed: launch it with DDP or FSDP2")


def make_learner(
    student: Any,
    objective: Objective,
    spec: Optimization,
    constrain: Constrain | None,
    accelerator: Accelerator,
    found: Path | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> Learner:
    """Freeze, wrap and prepare a student.

    Args:
        student: A transformers model on the CPU.
        objective: What is minimised.
        spec: The recipe's section.
        constrain: Makes the masks, from a student whose frozen parameters are set.
        accelerator: From `make_accelerator`.
        found: The checkpoint that it continues from; None: it starts with the student's weights.
        say: Gets a line about what learns beside adapters.

    Raises:
        InputError: A name pattern matches nothing, or the launch cannot do what the recipe asks for.
    """
    check_launch_keeps(spec, accelerator.distributed_type)
    adapters = None
    if spec.lora is None:
        freeze(student, [*spec.freeze, *unused_parameters(student)], spec.only)
    else:
        import_bitsandbytes()  # as peft does
        from distill.training.lora import Adapters

        adapters = Adapters(student, spec.lora)
        say(f"  {adapters.describe()}")
    masks = constrain(student) if constrain else None
    kind = ZeroLearner if accelerator.distributed_type == DistributedType.DEEPSPEED else Learner
    trained = copy.deepcopy(student) if accelerator.distributed_type in SHARDING else student
    if spec.gradient_checkpointing:
        gradient_checkpointing(trained, "enable")({"use_reentrant": False})
    masters = Masters(trained, adapters.parameters if adapters else set()) if spec.weights == "bf16" else None
    wrapper = DistillModel(trained, objective).train()
    optimizer = make_optimizer(wrapper, spec, masters.rests if masters else None)
    kind.before_prepare(wrapper, masks, found)
    model, prepared = accelerator.prepare(wrapper, optimizer)
    if masks is not None:
        masks.follow(wrapper.student)
        if found is None:
            masks.after_step(0)
    if masters is not None:
        masters.optimizer = optimizer
    ema = Ema(wrapper, spec.ema, masters.of if masters else Tensor.detach) if spec.ema is not None else None
    skip_rule = SkipRule(spec.skip_spikes, accelerator.device)
    learner = kind(
        accelerator, student, model, wrapper, prepared, optimizer, skip_rule, ema, masks, spec, masters, adapters
    )
    if found is not None:
        learner.load(found)
    return learner

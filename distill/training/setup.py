"""What a training is set up from: the Accelerator, its length, and what learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from distill.errors import InputError
from distill.models.forward import Batch
from distill.ranks import check_launch, process_state
from distill.recipe.schema import Optimization


class Batches(Protocol):
    """What the loop needs of the data (`distill.data.TrainingBatches`)."""

    @property
    def batch_size(self) -> int:
        """Examples per step over all processes."""

    def micro_batches_per_step(self) -> int:
        """Forward passes per optimizer step over all processes."""

    def steps_for(self, epochs: float) -> int:
        """Optimizer steps in so many epochs."""

    def steps_for_tokens(self, tokens: int) -> int:
        """Optimizer steps until so many tokens have been seen."""

    def epoch_at(self, step: int) -> float:
        """Epochs done after `step` steps."""

    def stream(
        self, start: int, stop: int, rank: int, world: int, workers: int = 0
    ) -> Iterator[list[tuple[int, Batch]]]:
        """This process's (number within the step, micro-batch) pairs, step by step."""


def make_accelerator(
    spec: Optimization, batches: Batches, trackers: Sequence[str] = (), folder: Path | None = None
) -> Accelerator:
    """An Accelerator for one training, which may have been started by `accelerate launch`.

    Args:
        spec: The recipe's section.
        batches: The micro-batches of every step.
        trackers: Names that Accelerate's `log_with` knows.
        folder: Where trackers that write files do so.

    Raises:
        InputError: The launch is not what it seems, or the step cannot be dealt out evenly to the processes.
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


def horizon(spec: Optimization, batches: Batches) -> int:
    """Optimizer steps of the whole training."""
    if spec.steps is not None:
        return spec.steps
    if spec.tokens is not None:
        return batches.steps_for_tokens(spec.tokens)
    assert spec.epochs is not None, "load_recipe checks that a length is given"
    return batches.steps_for(spec.epochs)

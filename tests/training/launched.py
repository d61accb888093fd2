"""One process of a training that a test launches: `launched.py FOLDER KIND STOP [FAULT]`.

KIND is `ddp`, `fsdp` (FSDP2), `zero2` or `zero3` (DeepSpeed), or `plain` (`ddp` without the average of weights, which
DeepSpeed does not take), with `-lm` for a language model instead of a classifier; all on a CPU, where Accelerate's own
launcher makes DDP of them. STOP `17:1`: evaluations every 17 steps, a
signal during the one after the first; `0:0`: none. FAULT, of the second process: `oom`, it runs out of memory; `nan`,
the gradient of one of its backward passes is not a number.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path

import running
import torch
from accelerate import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from tiny import tiny_model, tiny_project

from distill.data import read_texts, tokenise
from distill.errors import DistillError
from distill.models.layout import layers_of
from distill.models.load import load_tokenizer
from distill.models.outputs import Outputs
from distill.recipe import load_recipe
from distill.training import make_accelerator
from distill.training.guards import processes
from distill.training.setup import configure_deepspeed
from distill.training.sharding import shard


def fsdp2_on_cpu(*arguments):
    accelerator = make_accelerator(*arguments)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    for state in (accelerator.state._shared_state, processes()._shared_state):
        state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def deepspeed_on_cpu(stage, spec, batches):
    import deepspeed

    for name in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__[name] = False  # nothing is compiled
    accelerator = make_accelerator(spec, batches)
    plugin = DeepSpeedPlugin(zero_stage=stage)
    plugin.set_mixed_precision("no" if spec.precision == "fp32" else spec.precision)
    plugin.select(_from_accelerator_state=True)
    for state in (accelerator.state._shared_state, processes()._shared_state):
        state["distributed_type"] = DistributedType.DEEPSPEED
    accelerator.state.deepspeed_plugins = plugin
    accelerator.deepspeed_engine_wrapped = None
    configure_deepspeed(accelerator, spec, batches.batch_size // batches.micro_batches_per_step())
    return accelerator


class Teacher:
    """A sharded model beside the student; it runs out of memory once where it is told to."""

    def __init__(self, sharded, fails):
        self.model, self.fails = tiny_model("bert").requires_grad_(False), fails
        if sharded:
            shard(self.model, layers_of(self.model))

    @torch.no_grad()
    def __call__(self, batch):
        if self.fails:
            raise torch.OutOfMemoryError("not enough")
        return Outputs(self.model(input_ids=batch["input_ids"]).logits, {})


def main():
    folder, kind, fault = Path(sys.argv[1]), sys.argv[2], sys.argv[4:]
    every, let_through = map(int, sys.argv[3].split(":"))
    evaluations = iter(range(100))
    rank = int(os.environ.get("RANK", "0"))
    project = folder.parent / f"project-{os.getpid()}"
    project.mkdir()
    kind, _, lm = kind.partition("-")
    spec = load_recipe(tiny_project(project), ["data.task=causal_lm", "data.labelled=null"] if lm else []).data
    corpus = tokenise(read_texts(spec, 0, project), spec, load_tokenizer(project / "teacher"))
    if kind == "fsdp":
        running.make_accelerator = fsdp2_on_cpu
    if kind.startswith("zero"):
        running.make_accelerator = partial(deepspeed_on_cpu, int(kind[-1]))

    def evaluate(model, _stopped):
        with torch.no_grad():
            model(input_ids=torch.ones(1, 4, dtype=torch.int64))
        if next(evaluations) == let_through and every and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"accuracy": 0.5}

    processes()
    sharded = kind not in ("ddp", "plain")
    teacher = Teacher(sharded, "oom" in fault and rank == 1) if sharded or fault else None
    model = tiny_model("llama") if lm else tiny_model("bert", **running.dropped(0.1), num_labels=len(corpus.classes))
    if "nan" in fault and rank == 1:
        passes = iter(range(10**6))
        # A hook on a module, which its copy has as well: where weights are sharded, a copy is trained.
        broken = lambda grads: tuple(grad * (float("nan") if next(passes) == 15 else 1) for grad in grads)  # noqa: E731
        model.classifier.register_full_backward_hook(lambda _module, grads, _out: broken(grads))
    job = {"evaluate": evaluate, "evaluate_every": every, "log_every": 1}
    try:
        model, said = running.run(
            corpus,
            folder,
            steps=50,
            micro=2,
            teacher=teacher,
            job=job,
            ema=0.9 if kind in ("ddp", "fsdp") else None,
            save_every=10,
            model=model,
        )
    except DistillError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    if rank == 0:
        print("\n".join(said))
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / "final.safetensors")
        model.save_pretrained(folder / "exported")


if __name__ == "__main__":
    main()

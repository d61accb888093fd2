"""A training in processes of its own, and one process of it: `launched(processes, folder, kind, stop, *fault)`.

`kind` is `ddp`, `fsdp` (FSDP2), `zero2` or `zero3` (DeepSpeed), or `plain` (`ddp` without the average of weights, which
DeepSpeed does not take), all on a CPU, where Accelerate's own launcher makes DDP of them; with `-lm` for a language
model instead of a classifier, `-sharded` for checkpoints of which each process writes its part, `-masks` for a student
under masks, `-wide` for a teacher of another width, whose hidden states are matched through projections, `-long` for 50
steps instead of 12, `-bf16` for bf16 weights with fp32 masters, `-eight` for these with moments of 8 bits, `-lora` for
adapters. `stop`, `5:1`: evaluations every 5 steps, a signal during the one after the first; `0:0`: none.
`fault`, of the second process: `oom`, it runs out of memory; `nan`, the gradient of one of its backward passes is not a
number; `quota`, it cannot write files of the size of its weights; `die`, it is killed while the checkpoint of the last
step is written.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from functools import partial

import running
import torch
from accelerate import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from forked import Processes
from safetensors.torch import save_file
from tiny import tiny_corpus, tiny_model, tiny_project

from distill.errors import DistillError
from distill.models.dtensor import shard_model
from distill.models.family import layers_of
from distill.models.forward import Outputs
from distill.ranks import process_state
from distill.recipe import load_recipe
from distill.recipe.schema import Mask
from distill.student.masks.masks import Masks
from distill.training import loop
from distill.training.deepspeed import configure_deepspeed
from distill.training.setup import make_accelerator

STEPS, LONG = 12, 50
MASK = Mask(sparsity=0.6, schedule="cubic", end=0.5, every=2)
"""No choice so late that rounding has made one process's weights other than two's."""


def fsdp2_on_cpu(state_dict_type, *arguments):
    accelerator = make_accelerator(*arguments)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
        state_dict_type=state_dict_type,
    )
    for state in (accelerator.state._shared_state, process_state()._shared_state):
        state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def deepspeed_on_cpu(stage, spec, folder):
    import deepspeed

    for name in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__[name] = False  # nothing is compiled
    accelerator = make_accelerator(spec, folder)
    plugin = DeepSpeedPlugin(zero_stage=stage)
    plugin.set_mixed_precision("no" if spec.precision == "fp32" else spec.precision)
    plugin.select(_from_accelerator_state=True)
    for state in (accelerator.state._shared_state, process_state()._shared_state):
        state["distributed_type"] = DistributedType.DEEPSPEED
    accelerator.state.deepspeed_plugins = plugin
    accelerator.deepspeed_engine_wrapped = None
    configure_deepspeed(accelerator, spec, spec.micro_batch_size)
    return accelerator


def die_at(folder):
    while not folder.exists():
        time.sleep(1e-4)
    os.kill(os.getpid(), signal.SIGKILL)


class Teacher:
    """A sharded model beside the student; it runs out of memory once where it is told to."""

    def __init__(self, sharded, fails):
        self.model, self.fails = tiny_model("bert").requires_grad_(False), fails
        if sharded:
            shard_model(self.model, layers_of(self.model))

    @torch.no_grad()
    def __call__(self, batch):
        if self.fails:
            raise torch.OutOfMemoryError("not enough")
        return Outputs(self.model(input_ids=batch["input_ids"]).logits, {})


def shared_out(kind, options):
    """Choose how the training that follows holds its weights."""
    if kind == "fsdp":
        saved = "SHARDED_STATE_DICT" if "sharded" in options else "FULL_STATE_DICT"
        loop.make_accelerator = partial(fsdp2_on_cpu, saved)
    if kind.startswith("zero"):
        loop.make_accelerator = partial(deepspeed_on_cpu, int(kind[-1]))


def break_down(fault, folder):
    if "die" in fault:
        threading.Thread(target=die_at, args=[folder / "checkpoints/.tmp-step-00000012"], daemon=True).start()
    if "quota" in fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def break_a_gradient(model):
    passes = iter(range(10**6))

    def broken(_module, grads, _out):
        return tuple(grad * (float("nan") if next(passes) == 5 else 1) for grad in grads)

    # A hook on a module, which its copy has as well: where weights are sharded, a copy is trained.
    model.classifier.register_full_backward_hook(broken)


def launched(processes, folder, kind="ddp", stop="0:0", *fault, codes=None):
    """Wait for the training, whose processes end with these codes (default: 0); returns what they said."""
    folder.mkdir(parents=True, exist_ok=True)
    started = Processes(folder.parent / f"{folder.name}.log", main, folder, kind, stop, *fault, ranks=processes)
    found = started.wait()
    assert found == (codes or [0] * processes), started.said
    return started.said


def main(folder, kind, stop, *fault):
    every, let_through = map(int, stop.split(":"))
    evaluations = iter(range(100))
    rank = int(os.environ.get("RANK", "0"))
    project = folder.parent / f"project-{os.getpid()}"
    project.mkdir()
    kind, *options = kind.split("-")
    lm = "lm" in options
    tiny_project(project)
    spec = load_recipe(project / "recipe.yaml").data
    spec = spec.model_copy(update={"task": "causal_lm", "labelled": None} if lm else {})
    corpus = tiny_corpus(project, spec=spec, seed=0)
    shared_out(kind, options)
    if rank == 1:
        break_down(fault, folder)

    def evaluate(model, _stopped):
        with torch.no_grad():
            model(input_ids=torch.ones(1, 4, dtype=torch.int64))
        if next(evaluations) == let_through and every and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"accuracy": 0.5}

    process_state()
    sharded = kind not in ("ddp", "plain")
    teacher = Teacher(sharded, "oom" in fault and rank == 1) if sharded or "oom" in fault else None
    model = tiny_model("llama") if lm else tiny_model("bert", **running.dropped(0.1), num_labels=len(corpus.classes))
    if "nan" in fault and rank == 1:
        break_a_gradient(model)
    wide = tiny_model("bert", seed=1, hidden_size=48, num_labels=len(corpus.classes)) if "wide" in options else None
    masks = []

    def constrain(student):
        masks.append(Masks(student, MASK, STEPS))
        return masks[0]

    job = {"evaluate": evaluate}
    spec = {"weights": "bf16", "precision": "bf16"} if {"bf16", "eight"} & {*options} else {}
    spec |= {"optimizer": "adamw_8bit"} if "eight" in options else {}
    spec |= {"lora": {"rank": 4}} if "lora" in options else {}
    if "masks" in options:
        job["constrain"] = constrain
    try:
        model, said = running.run(
            corpus,
            folder,
            steps=LONG if "long" in options else STEPS,
            micro=2,
            teacher=teacher,
            wide=wide,
            job=job,
            ema=0.9 if kind in ("ddp", "fsdp") else None,
            save_every=4,
            evaluate_every=every,
            log_every=1,
            model=model,
            **spec,
        )
    except DistillError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    if rank == 0:
        print("\n".join(said))
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / "final.safetensors")
        if masks:
            save_file({name: model.get_parameter(name) == 0 for name in masks[0].masks}, folder / "zeros.safetensors")
        model.save_pretrained(folder / "exported")

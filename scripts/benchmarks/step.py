"""One distillation step, the same work by several programs: time, MFU and peak memory.

    python scripts/benchmarks/step.py
    python scripts/benchmarks/step.py --setting 32k --rounds 3 --arms naive ours

Teacher and student are random Llamas (8 and 4 layers), the optimizer is AdamW, the loss forward KL; fp32, one thread.
Every arm runs in a process of its own and is timed by its CPU time, so that other work on the machine changes the
figures little; compare arms of one run only. Peers are measured where they are installed.

    time       CPU seconds of a step, the best of all; rel: divided by that of `naive`
    MFU        model FLOPs utilization: F_t + 3 F_s per token at the rate of a large matrix product in the same process
    peak       memory above the models and the optimizer's state, in units of one fp32 [tokens, vocabulary]; from a
               process of its own in which freed memory goes back to the system at once
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = {
    # vocabulary, hidden, ffn, tokens
    "8k": (8192, 512, 1376, 2048),
    "32k": (32000, 256, 688, 2048),
    "128k": (128000, 256, 688, 1024),
    "128k-double": (128000, 256, 688, 2048),
}
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
LENGTH, TEACHER_LAYERS, STUDENT_LAYERS = 256, 8, 4


def main() -> None:
    """Run every arm of every setting in its own process, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=2, help="processes per arm; the best counts")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per process")
    parser.add_argument("--medium", action="store_true", help="torch.set_float32_matmul_precision('medium')")
    parser.add_argument("--one", nargs=2, metavar=("SETTING", "ARM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.steps, options.medium)))
        return
    for setting in options.setting:
        vocabulary, hidden, ffn, tokens = SETTINGS[setting]
        print(f"\n{setting}: vocabulary {vocabulary}, hidden {hidden}, ffn {ffn}, {tokens} tokens per step")
        print(f"{'arm':<16}{'time s':>8}{'rel':>7}{'tokens/s':>10}{'MFU':>7}{'peak':>7}{'loss':>9}", flush=True)
        rows: dict[str, dict] = {}
        for _ in range(options.rounds):
            for arm in options.arms:
                found = _in_its_own_process(setting, arm, options)
                if found is not None:
                    found["peak"] = (_in_its_own_process(setting, arm, options, RETURNING) or found)["peak"]
                    rows[arm] = found if arm not in rows else _best(rows[arm], found)
        for arm, row in rows.items():
            rel = f"{row['time'] / rows['naive']['time']:.2f}" if "naive" in rows else "-"
            speed = f"{tokens / row['time']:.0f}"
            print(
                f"{arm:<16}{row['time']:>8.3f}{rel:>7}{speed:>10}{row['mfu']:>7.2f}{row['peak']:>7.2f}"
                f"{row['loss']:>9.4f}",
                flush=True,
            )


def _best(one: dict, other: dict) -> dict:
    return {
        "time": min(one["time"], other["time"]),
        "mfu": max(one["mfu"], other["mfu"]),
        "peak": min(one["peak"], other["peak"]),
        "loss": one["loss"],
    }


def _in_its_own_process(
    setting: str, arm: str, options: argparse.Namespace, extra: dict[str, str] | None = None
) -> dict | None:
    command = [sys.executable, __file__, "--one", setting, arm, "--steps", str(options.steps)]
    command += ["--medium"] * options.medium
    path = f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        command, env=os.environ | one_thread | (extra or {}), capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"{arm:<16}  {done.stderr.strip().splitlines()[-1][:90]}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def measure(setting: str, arm: str, steps: int, medium: bool) -> dict:
    """One arm in this process."""
    import torch

    torch.set_num_threads(1)
    if medium:
        torch.set_float32_matmul_precision("medium")
    vocabulary, hidden, ffn, tokens = SETTINGS[setting]
    torch.manual_seed(0)
    teacher, student = (_model(layers, vocabulary, hidden, ffn) for layers in (TEACHER_LAYERS, STUDENT_LAYERS))
    ids = torch.randint(vocabulary, (tokens // LENGTH, LENGTH))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    step = ARMS[arm](teacher, student)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-4, fused=True)
    rate = 0.0
    times, peaks, losses = [], [], []
    for number in range(steps + 1):
        rate = max(rate, _matmul_rate())
        rest = _at_rest()
        start = time.process_time()
        loss = step(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number:  # the first step makes the optimizer's state
            times.append(time.process_time() - start)
            peaks.append(_peak() - rest)
        losses.append(loss.item())
        del loss
    flops = _flops(TEACHER_LAYERS, hidden, ffn, vocabulary) * (arm != "plain_ce")
    flops += 3 * _flops(STUDENT_LAYERS, hidden, ffn, vocabulary)
    return {
        "time": min(times),
        "mfu": flops * tokens / rate / min(times),
        "peak": min(peaks) / (4 * tokens * vocabulary),
        "loss": losses[0],
    }


def _model(layers: int, vocabulary: int, hidden: int, ffn: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def _flops(layers: int, hidden: int, ffn: int, vocabulary: int) -> float:
    """Forward pass per token; of the causal attention only the half that counts."""
    body = layers * (2 * (4 * hidden**2 + 3 * hidden * ffn) + 2 * LENGTH * hidden)
    return body + 2 * hidden * vocabulary


def _matmul_rate() -> float:
    """FLOPs per CPU second of a matrix product of 1024 x 1024."""
    import torch

    left, right, out = (torch.randn(1024, 1024) for _ in range(3))
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        torch.mm(left, right, out=out)
        best = min(best, time.process_time() - start)
    return 2 * 1024**3 / best


def _at_rest() -> int:
    """Bytes in memory after freed memory went back to the system; starts a new measurement of the peak."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


# --- the arms: (teacher, student) -> (batch -> loss) -----------------------------------------------------------------


def plain_ce(_teacher, student):
    """Cross-entropy as transformers computes it; no teacher."""
    return lambda batch: student.train()(**batch).loss


def naive(teacher, student):
    """The loop that everybody writes first."""
    return _on_logits(teacher, student, _kl_div)


def _kl_div(own, target):
    from torch.nn import functional

    own, target = own.log_softmax(-1).flatten(0, 1), target.softmax(-1).flatten(0, 1)
    return functional.kl_div(own, target, reduction="batchmean")


def _on_logits(teacher, student, loss):
    import torch

    teacher.eval().requires_grad_(False)

    def step(batch):
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            target = teacher(**inputs).logits
        return loss(student(**inputs).logits[:, :-1], target[:, :-1])

    return step


def ours(teacher, student, *, hidden: bool = False):
    """As a recipe with `match: logits` trains."""
    from functools import partial

    import torch

    from distill.losses import Objective, layer_map
    from distill.recipe.schema import Term
    from distill.teacher import LiveTeacher
    from distill.training.model import DistillModel

    pairs = [(layer, 2 * layer + 1) for layer in range(STUDENT_LAYERS)]
    terms = [Term(match="logits"), *([Term(match="hidden", map=pairs)] if hidden else [])]
    maps = partial(layer_map, plan=None, student_layers=STUDENT_LAYERS, teacher_layers=TEACHER_LAYERS)
    objective = Objective(terms, "next_token", maps)
    source, model = LiveTeacher(teacher, objective.teacher, torch.device("cpu")), DistillModel(student, objective)
    return lambda batch: model(batch, source(batch), objective.counts([batch]))[0]


def ours_bf16_teacher(teacher, student):
    """The same with the teacher in bf16."""
    import torch

    return ours(teacher.to(torch.bfloat16), student)


def ours_hidden(teacher, student):
    """The same, and a hidden-state term on every layer of the student."""
    return ours(teacher, student, hidden=True)


def ours_frozen(teacher, student):
    """The embeddings and half of the student's layers are the teacher's first ones, and frozen."""
    from distill.models.trainable import freeze

    student.model.embed_tokens.load_state_dict(teacher.model.embed_tokens.state_dict())
    for layer in range(STUDENT_LAYERS // 2):
        student.model.layers[layer].load_state_dict(teacher.model.layers[layer].state_dict())
    freeze(student, ["*.embed_tokens.*", *(f"*.layers.{layer}.*" for layer in range(STUDENT_LAYERS // 2))])
    return ours(teacher, student)


def trl_gkd(teacher, student):
    """The divergence of TRL's GKDTrainer, forward KL."""
    from trl.experimental.gkd import GKDTrainer

    loss = GKDTrainer.generalized_jsd_loss
    return _on_logits(teacher, student, lambda own, target: loss(own, target, beta=0.0) / own.shape[1])


def torchtune_kl(teacher, student):
    """Torchtune's ForwardKLLoss (soft cross-entropy)."""
    from torchtune.modules.loss import ForwardKLLoss

    loss = ForwardKLLoss()
    return _on_logits(teacher, student, lambda own, target: loss(own, target, own.new_zeros(own.shape[:2]).long()))


def textbrewer_ce(teacher, student):
    """TextBrewer's kd_ce_loss (soft cross-entropy)."""
    from textbrewer.losses import kd_ce_loss

    return _on_logits(teacher, student, kd_ce_loss)


def liger_jsd(teacher, student):
    """Liger's chunked loss from hidden states, not compiled, forward KL."""
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=256)
    teacher.eval().requires_grad_(False)

    def step(batch):
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            target = teacher.model(**inputs).last_hidden_state[:, :-1].flatten(0, 1)
        own = student.model(**inputs).last_hidden_state[:, :-1].flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        return loss(own, student.lm_head.weight, target, teacher.lm_head.weight, labels)

    return step


ARMS = {
    "plain_ce": plain_ce,
    "naive": naive,
    "ours": ours,
    "ours_bf16_teacher": ours_bf16_teacher,
    "ours_hidden": ours_hidden,
    "ours_frozen": ours_frozen,
    "trl_gkd": trl_gkd,
    "liger_jsd": liger_jsd,
    "torchtune_kl": torchtune_kl,
    "textbrewer_ce": textbrewer_ce,
}

if __name__ == "__main__":
    main()

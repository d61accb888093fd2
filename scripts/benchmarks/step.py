"""One distillation step, the same work by several programs: time, MFU, peak memory and error of the gradient.

    python scripts/benchmarks/step.py
    python scripts/benchmarks/step.py --setting 32k --rounds 3 --arms naive ours
    python scripts/benchmarks/step.py --device cuda
    python scripts/benchmarks/step.py --device cuda --arms naive ours_chunk_512 ours_chunk_2048 ours_chunk_8192

Teacher and student (half of its layers) are random Llamas, the optimizer is AdamW, the loss forward KL on every
position. On a CPU: fp32, one thread, CPU time, so that other work on the machine changes little. On a GPU: a teacher in
bf16, a student of fp32 weights with half of its MLPs under bf16 autocast, time by the device's own events. Every arm
runs in a process of its own; compare arms of one run only. Peers are measured where they are installed.

    time       of a step: on a CPU seconds, the best; on a GPU milliseconds, the median; rel: over that of `naive`
    MFU        model FLOPs utilization: F_t + 3 F_s per token, over the rate of a large product in the same process
    peak       memory above the models and the optimizer's state, in units of one fp32 [tokens, vocabulary]; on a CPU
               from a process of its own in which freed memory goes back to the system at once
    error      of the gradient by the output head of a student near its teacher (KL about 0.001), against float64
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from step_arms import ARMS, USUAL


@dataclass(frozen=True)
class Setting:
    """Sizes of both models and of a step."""

    vocabulary: int
    hidden: int
    ffn: int
    tokens: int
    length: int = 256
    layers: int = 8
    """Of the teacher; the student has half."""
    narrow: int = 1
    """The student's MLP is so many times narrower."""
    groups: int = 1
    """Query heads per key-value head."""
    tied: bool = False


SETTINGS = {
    "cpu": {
        "8k": Setting(8192, 512, 1376, 2048),
        "32k": Setting(32000, 256, 688, 2048),
        "128k": Setting(128000, 256, 688, 1024),
        "128k-double": Setting(128000, 256, 688, 2048),
    },
    "cuda": {"1b": Setting(128256, 2048, 8192, 8192, 2048, 16, narrow=2, groups=4, tied=True)},
}
OTHER_LOSSES = ("plain_ce", "ours_labels", "ours_hidden", "ours_frozen")
"""Arms whose gradient is not that of forward KL alone."""
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def main() -> None:
    """Run every arm of every setting in its own process, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SETTINGS), default="cpu")
    parser.add_argument("--setting", nargs="+", help="default: all of the device")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: the usual ones of the device")
    parser.add_argument("--rounds", type=int, help="processes per arm, the best counts; default: 2, on a GPU 1")
    parser.add_argument("--steps", type=int, help="timed steps per process; default: 3, on a GPU 10")
    parser.add_argument("--medium", action="store_true", help="torch.set_float32_matmul_precision('medium')")
    parser.add_argument("--one", nargs=2, metavar=("SETTING", "ARM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings, on_gpu = SETTINGS[options.device], options.device == "cuda"
    options.steps = options.steps or (10 if on_gpu else 3)
    if options.one:
        print(json.dumps(measure(settings[options.one[0]], options.one[1], options)))
        return
    for name in options.setting or settings:
        if name not in settings:
            parser.error(f"--setting: {name} is not one of {', '.join(settings)}")
        print(f"\n{name}: {settings[name]}")
        print(
            f"{'arm':<19}{'time':>8}{'rel':>7}{'tokens/s':>10}{'MFU':>7}{'peak':>7}{'error':>9}{'loss':>9}", flush=True
        )
        rows: dict[str, dict] = {}
        for _ in range(options.rounds or (1 if on_gpu else 2)):
            for arm in options.arms or USUAL[options.device]:
                found = _in_its_own_process(name, arm, options)
                if found is not None:
                    if not on_gpu:
                        found["peak"] = (_in_its_own_process(name, arm, options, RETURNING) or found)["peak"]
                    rows[arm] = found if arm not in rows else _best(rows[arm], found)
        for arm, row in rows.items():
            rel = f"{row['time'] / rows['naive']['time']:.2f}" if "naive" in rows else "-"
            speed = f"{settings[name].tokens / row['time']:.0f}"
            shown = f"{1000 * row['time']:.1f} ms" if on_gpu else f"{row['time']:.3f}"
            print(
                f"{arm:<19}{shown:>8}{rel:>7}{speed:>10}{row['mfu']:>7.2f}{row['peak']:>7.2f}{row['error']:>9.0e}"
                f"{row['loss']:>9.4f}",
                flush=True,
            )


def _best(one: dict, other: dict) -> dict:
    least = {key: min(one[key], other[key]) for key in ("time", "peak")}
    return one | least | {"mfu": max(one["mfu"], other["mfu"])}


def _in_its_own_process(
    setting: str, arm: str, options: argparse.Namespace, extra: dict[str, str] | None = None
) -> dict | None:
    command = [sys.executable, __file__, "--device", options.device, "--one", setting, arm]
    command += ["--steps", str(options.steps), *["--medium"] * options.medium]
    path = f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    settings = {"PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"}
    if options.device == "cpu":
        settings |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=os.environ | settings | (extra or {}), capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    for line in lines[: None if done.returncode else -1]:
        print(f"{arm:<19}  {line[:90]}", flush=True)
    if done.returncode:
        print(f"{arm:<19}  {(done.stderr.strip() or 'no message').splitlines()[-1][:90]}", flush=True)
        return None
    return json.loads(lines[-1])


def measure(setting: Setting, arm: str, options: argparse.Namespace) -> dict:
    """One arm in this process."""
    import torch

    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    if options.medium:
        torch.set_float32_matmul_precision("medium")
    teacher, student = (_model(setting, side, device) for side in ("teacher", "student"))
    step = ARMS[arm](teacher, student)
    batches = [_batch(setting, seed, step, device) for seed in range(3)]
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-5, fused=True)
    rate, rest, first = 0.0, 0, 0.0
    times, peaks = [], []
    warm = 3 if on_gpu else 1  # the first step makes the optimizer's state, and what is compiled
    for number in range(options.steps + warm):
        if not on_gpu or number == warm:
            rate, rest = max(rate, _matmul_rate(device)), _at_rest(device)
        clock = _Clock(device)
        with _autocast(device):
            loss = step(batches[number % len(batches)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = clock.stop()
        if number >= warm:
            times.append(seconds)
            peaks.append(_peak(device) - rest)
        first = first if number else loss.item()
        del loss
    flops = 3 * _flops(setting, "student") + _flops(setting, "teacher") * (arm != "plain_ce")
    taken = statistics.median(times) if on_gpu else min(times)
    del teacher, student, step, optimizer
    return {
        "time": taken,
        "mfu": flops * setting.tokens / rate / taken,
        "peak": (max if on_gpu else min)(peaks) / (4 * setting.tokens * setting.vocabulary),
        "loss": first,
        "error": float("nan") if arm in OTHER_LOSSES else gradient_error(arm, device),
    }


class _Clock:
    """CPU seconds of this process, or seconds between two events on the GPU."""

    def __init__(self, device):
        import torch

        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self.start = time.process_time()
        if self.events:
            self.events[0].record()

    def stop(self) -> float:
        if not self.events:
            return time.process_time() - self.start
        self.events[1].record()
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1000


def _autocast(device):
    import torch

    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _model(setting: Setting, side: str, device):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    small = side == "student"
    config = LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=setting.hidden,
        intermediate_size=setting.ffn // (setting.narrow if small else 1),
        num_hidden_layers=setting.layers // (2 if small else 1),
        num_attention_heads=setting.hidden // 64,
        num_key_value_heads=setting.hidden // 64 // setting.groups,
        max_position_embeddings=setting.length,
        tie_word_embeddings=setting.tied,
        use_cache=False,
    )
    torch.manual_seed(small)
    with device:
        model = LlamaForCausalLM(config)
    if small:
        return model.train()
    return model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval().requires_grad_(False)


def _batch(setting: Setting, seed: int, step, device) -> dict:
    import torch

    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(setting.vocabulary, (setting.tokens // setting.length, setting.length), generator=draw)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    batch = getattr(step, "prepare", lambda batch: batch)(batch)
    return {key: tensor.to(device) for key, tensor in batch.items()}


def _flops(setting: Setting, side: str) -> float:
    """Forward pass per token; of the causal attention only the half that counts."""
    small, width = side == "student", setting.hidden
    ffn = setting.ffn // (setting.narrow if small else 1)
    products = 2 * width**2 + 2 * width * (width // setting.groups) + 3 * width * ffn
    body = setting.layers // (2 if small else 1) * (2 * products + 2 * setting.length * width)
    return body + 2 * width * setting.vocabulary


def _matmul_rate(device) -> float:
    """FLOPs per second (of the CPU time, on a CPU) of a square matrix product, the best of five."""
    import torch

    on_gpu = device.type == "cuda"
    size, kind = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    left, right, out = (torch.randn(size, size, dtype=kind, device=device) for _ in range(3))
    best = float("inf")
    for _ in range(10 if on_gpu else 5):
        clock = _Clock(device)
        torch.mm(left, right, out=out)
        best = min(best, clock.stop())
    return 2 * size**3 / best


def _at_rest(device) -> int:
    """Bytes in use, freed memory not counted; starts a new measurement of the peak."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device) -> int:
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def gradient_error(arm: str, device) -> float:
    """Relative error of the gradient by the head against float64, of models that are embeddings and a head alone."""
    import torch

    setting = Setting(32000, 512, 64, 512, layers=0)
    teacher, student = (_model(setting, side, device) for side in ("teacher", "student"))
    draw = torch.Generator().manual_seed(0)
    kind = next(teacher.parameters()).dtype
    with torch.no_grad():
        table, weight, noise = (torch.randn(setting.vocabulary, setting.hidden, generator=draw) for _ in range(3))
        for model, head in ((teacher, 0.1 * weight), (student, 0.1 * weight + 0.002 * noise)):
            model.model.embed_tokens.weight.copy_(table.to(kind))
            model.lm_head.weight.copy_(head.to(kind) if model is teacher else head)
    step = ARMS[arm](teacher, student)
    batch = _batch(setting, 0, step, device)
    with _autocast(device):
        loss = step(batch)
    loss.backward()
    found = student.lm_head.weight.grad.double()
    rows = student.model.embed_tokens.weight.double()[batch["input_ids"][:, :-1]].flatten(0, 1)
    rows = rows * (rows.square().mean(-1, keepdim=True) + student.config.rms_norm_eps).rsqrt()
    own, target = (rows @ model.lm_head.weight.double().T for model in (student, teacher))
    slope = own.softmax(-1) - target.softmax(-1)
    exact = slope.T @ rows / len(rows)
    scale = (found * exact).sum() / exact.square().sum()  # some take another mean; labels and layers are not in it
    return ((found / scale - exact).norm() / exact.norm()).item()


if __name__ == "__main__":
    main()

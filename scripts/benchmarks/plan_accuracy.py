"""What `distill plan` says a training takes, against what it takes: peak memory and tokens per second, on this CPU.

    python scripts/benchmarks/plan_accuracy.py
    python scripts/benchmarks/plan_accuracy.py --case llama llama-hidden --steps 4

Every case is a recipe that is run up to its student and planned; its student is then trained for a few steps, in
processes of their own. Peaks are those of a step, above what the process held before models were loaded, with freed
memory going back to the system at once; writing a checkpoint and evaluations are not part of them. Speeds are CPU time
with one thread, the best step of all, so that other work on the machine changes the figures little.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LLAMA = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8}
LLAMA |= {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 512}
HIDDEN = "losses=[{match: logits}, {match: hidden, loss: mse, map: plan}]"
LOGITS = "losses=[{match: logits}]"
SHORT = ["teacher.fit.steps=1", "teacher.fit.epochs=null", "training.epochs=null", "training.evaluate_every=0"]
LM = ["data.max_length=256", "data.limit=8", "teacher.fit.batch_size=4", "teacher.fit.micro_batch_size=4"]
LM += ["training.batch_size=8", "training.micro_batch_size=4", "student.layers.keep=4", "training.tokens=null"]
CASES: dict[str, tuple[str, list[str]]] = {
    # recipe, overrides; recipes of a language model get a larger config
    "minilm": ("quickstart", ["losses=[{match: labels}, {match: logits}]"]),
    "minilm-hidden": ("quickstart", [HIDDEN]),
    "llama": ("stdlib-lm", [LOGITS, *LM]),
    "llama-hidden": ("stdlib-lm", [HIDDEN, *LM]),
    "llama-checkpointing": ("stdlib-lm", [LOGITS, *LM, "training.gradient_checkpointing=true"]),
    "llama-bf16-weights": ("stdlib-lm", [LOGITS, *LM, "training.weights=bf16", "training.precision=bf16"]),
    "llama-lora": ("stdlib-lm", [LOGITS, *LM, "training.lora={rank: 16}"]),
}


def main() -> None:
    """Run every case, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=4, help="steps of each training; the first is not timed")
    parser.add_argument("--one", nargs=3, metavar=("RECIPE", "FOLDER", "WHAT"), help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args()
    if options.one:
        path, folder, what = options.one
        print(json.dumps((plan if what == "plan" else train)(path, Path(folder), overrides)))
        return
    print(
        f"{'case':<22}{'planned GB':>11}{'peak GB':>9}{'off':>8}{'planned tok/s':>15}{'tok/s':>9}{'off':>8}", flush=True
    )
    for case in options.case:
        with tempfile.TemporaryDirectory() as scratch:
            print(f"{case:<22}" + _row(case, Path(scratch), options.steps), flush=True)


def _row(case: str, scratch: Path, steps: int) -> str:
    recipe, overrides = CASES[case]
    command = [str(_recipe(recipe, scratch)), str(scratch / "run")]
    overrides = [*SHORT, f"training.steps={steps}", *overrides]
    planned = _in_its_own_process([*command, "plan"], overrides, {})
    speed = _in_its_own_process([*command, "train"], overrides, {})["speed"]
    peak = _in_its_own_process([*command, "train"], overrides, RETURNING)["peak"]
    return (
        f"{planned['peak'] / 1e9:>11.3f}{peak / 1e9:>9.3f}{planned['peak'] / peak - 1:>8.1%}"
        f"{planned['speed']:>15.0f}{speed:>9.0f}{planned['speed'] / speed - 1:>8.1%}"
    )


def _recipe(name: str, scratch: Path) -> Path:
    """Copy a recipe; of a language model with the config of a larger teacher."""
    folder = shutil.copytree(ROOT / "recipes" / name, scratch / name)
    config = folder / "teacher" / "config.json"
    if config.exists():
        config.write_text(json.dumps(json.loads(config.read_text()) | LLAMA))
    return folder / "recipe.yaml"


def _in_its_own_process(command: list[str], overrides: list[str], extra: dict[str, str]) -> dict:
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": path} | extra
    whole = [sys.executable, __file__, *overrides, "--one", *command]
    done = subprocess.run(whole, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _session(path: str, folder: Path, overrides: list[str]):
    from distill.pipeline import RunDir, Session
    from distill.recipe.load import load_recipe

    recipe = load_recipe(path, overrides)
    return Session(recipe, Path(path).parent, RunDir(folder), lambda line: print(line, file=sys.stderr))


def plan(path: str, folder: Path, overrides: list[str]) -> dict:
    """Run a recipe up to its student; return what the plan says about the student's training."""
    import torch

    from distill.pipeline import STORY, VERBS, run_stages
    from distill.pipeline.resources import peak_of, time_of
    from distill.pipeline.trainings import works_of

    time.perf_counter = time.process_time  # what the planner's clock reads
    session = _session(path, folder, overrides)
    run_stages(session, VERBS["build"], STORY)
    work = next(work for work in works_of(session) if work.rehearsal.title == "distilled")
    peak, step = peak_of(work.rehearsal, torch.device("cpu")), time_of(work, torch.device("cpu"))
    return {"peak": peak.total, "speed": work.tokens / step.seconds}


def train(path: str, folder: Path, overrides: list[str]) -> dict:
    """Train the student anew; return the peak of its steps and its best speed."""
    from distill.models.forward import token_count
    from distill.pipeline.train import train_arm
    from distill.training.step import Step

    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    session = _session(path, folder, overrides)
    _ = session.corpus, session.tokenizer
    _touch_libraries()
    rest, peaks, speeds, take_step = _at_rest(), [], [], Step.__call__

    def measured(self, numbered, *others):
        _at_rest()
        start = time.process_time()
        result = take_step(self, numbered, *others)
        speeds.append(sum(token_count(batch) for _, batch in numbered) / (time.process_time() - start))
        peaks.append(_status("VmHWM"))
        return result

    Step.__call__ = measured
    train_arm(session, "distilled")
    return {"peak": max(peaks) - rest, "speed": max(speeds[1:])}


def _touch_libraries() -> None:
    """Take steps with small models, after which the code of the libraries is in memory, where it counts as well."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    ids = torch.randint(4096, (4, 128))
    for model in (BertForSequenceClassification(BertConfig(**sizes)), LlamaForCausalLM(LlamaConfig(**sizes))):
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            logits.log_softmax(-1).float().square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def _at_rest() -> int:
    """Bytes in memory after freed memory went back to the system; starts a new measurement of the peak."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()

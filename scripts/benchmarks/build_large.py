"""Plan and build a student of a 1 B-parameter Llama with random weights in bf16; print seconds and the peak of memory.

    python scripts/benchmarks/build_large.py
    python scripts/benchmarks/build_large.py --tiny

Half of the layers and half of each MLP are kept, by weight magnitude. The peak is that of planning and building, less
what the process needs without a model, over the bytes of teacher and student: 1.00 is what has to be there. Linux only.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.recipe.schema import Student
from distill.student import build_student, plan_student

LARGE = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
TINY = {**LARGE, "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}


def main() -> None:
    """Make the teacher, then measure from there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model of 1.6 M parameters, to try the script")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    without_model = memory("VmRSS")
    start = time.monotonic()
    teacher = LlamaForCausalLM._from_config(LlamaConfig(**(TINY if options.tiny else LARGE)), dtype=torch.bfloat16)
    print(f"teacher of {teacher.num_parameters():,} parameters made in {time.monotonic() - start:.1f} s")

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    layers = teacher.config.num_hidden_layers // 2
    spec = Student.model_validate({"layers": {"keep": layers}, "mlp": {"keep": 0.5, "score": "magnitude"}})
    start = time.monotonic()
    plan = plan_student(teacher.eval(), spec)
    planned = time.monotonic()
    student = build_student(teacher, plan)
    built = time.monotonic()
    peak, needed = memory("VmHWM") - without_model, size(teacher) + size(student)
    print(f"student of {student.num_parameters():,} parameters, {layers} layers of width {plan.widths[0]}")
    print(f"plan {planned - start:.1f} s, build {built - planned:.1f} s")
    print(f"peak {peak / 1e9:.2f} GB, teacher and student {needed / 1e9:.2f} GB: {peak / needed:.2f}x")


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def size(model: LlamaForCausalLM) -> int:
    """Bytes of the parameters, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


if __name__ == "__main__":
    main()

"""Figures of `distill.evaluation.efficiency` beside those of `torch.utils.benchmark` for the same passes.

    python scripts/benchmarks/efficiency_check.py
    python scripts/benchmarks/efficiency_check.py --device cuda

A random BERT of 6 layers and one of 3, in fp32 and bf16. Both measure medians; beside ours stand the blocks of
`blocked_autorange`, and in brackets half the distance of its quartiles, the noise of the machine while it ran.
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.benchmark import Timer
from transformers import BertConfig, BertForSequenceClassification

from distill.evaluation.efficiency import in_bf16, measure_efficiency
from distill.models.cost import random_batch
from distill.models.family import all_layers

LENGTH, VOCABULARY, BATCHES = 64, 1000, (1, 8)


def made(layers: int, device: str) -> BertForSequenceClassification:
    """Make a random model."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **sizes)).eval().to(device)


def main() -> None:
    """Measure every model both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="of torch.utils.benchmark for each figure")
    options = parser.parse_args()
    models = {"teacher": made(6, options.device), "student": made(3, options.device)}
    models |= in_bf16(models)
    found = measure_efficiency(
        models, all_layers, kind="sequence", length=LENGTH, batch_sizes=BATCHES, vocabulary=VOCABULARY
    )
    print(f"{found['protocol']['device']}, {found['protocol']['threads']} threads, torch {torch.__version__}")
    print(f"{'':16}{'batch':>6}{'ours, ms':>10}{'theirs, ms':>20}{'ours / theirs':>15}")
    for name, model in models.items():
        for size in BATCHES:
            batch = random_batch(model, (size, LENGTH), VOCABULARY)
            ours = 1000 * size / found["models"][name]["throughputs"][str(size)]
            with torch.inference_mode():
                timer = Timer(
                    "model(**batch)", globals={"model": model, "batch": batch}, num_threads=torch.get_num_threads()
                )
                theirs = timer.blocked_autorange(min_run_time=options.seconds)
            middle, noise = 1000 * theirs.median, 1000 * theirs.iqr / 2
            print(f"{name:16}{size:6}{ours:10.2f}{middle:12.2f} ({noise:.2f}){ours / middle:15.2f}")


if __name__ == "__main__":
    main()

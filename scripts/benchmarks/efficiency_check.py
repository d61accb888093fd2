"""Figures of `distill.evaluation.efficiency` beside those of `torch.utils.benchmark` for the same passes.

    python scripts/benchmarks/efficiency_check.py
    python scripts/benchmarks/efficiency_check.py --device cuda

A random BERT of 6 layers and one of 3, in fp32 and bf16. A shared machine drifts within a minute by more than the two
can differ, so in every round one measurement of ours stands between two of theirs, and ours is divided by the mean of
those. What the machine is good for stands beside it: their second measurement divided by their first. Of both the
median and, in brackets, the quartiles over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch.utils.benchmark import Timer
from transformers import BertConfig, BertForSequenceClassification

from distill.evaluation.efficiency import device_name, in_bf16, measure_efficiency
from distill.models.cost import random_batch
from distill.models.family import all_layers

LENGTH, VOCABULARY, BATCHES = 64, 1000, (1, 8)


def made(layers: int, device: str) -> BertForSequenceClassification:
    """Make a random model."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **sizes)).eval().to(device)


def time_theirs(models: dict[str, Any], batches: dict[int, Any], seconds: float) -> dict[tuple[str, str], float]:
    """Measure the median milliseconds of a pass by model and figure with `torch.utils.benchmark`."""
    found = {}
    for name, model in models.items():
        for size, batch in batches.items():
            known = {"model": model, "batch": batch}
            with torch.inference_mode():
                timer = Timer("model(**batch)", globals=known, num_threads=torch.get_num_threads())
                found[name, f"batch {size}"] = 1000 * timer.blocked_autorange(min_run_time=seconds).median
        found[name, "latency"] = found[name, "batch 1"]
    return found


def time_ours(models: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Read the same milliseconds from the latency and the throughputs that the project's own protocol gives."""
    found = {}
    measured = measure_efficiency(
        models, all_layers, kind="sequence", length=LENGTH, batch_sizes=BATCHES, vocabulary=VOCABULARY
    )
    for name, figures in measured["models"].items():
        found[name, "latency"] = figures["latency_ms"]["p50"]
        found |= {(name, f"batch {size}"): 1000 * size / figures["throughputs"][str(size)] for size in BATCHES}
    return found


def spread(values: list[float]) -> str:
    """Write the median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Measure every model both ways, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="of torch.utils.benchmark for each figure")
    options = parser.parse_args()
    models = {"teacher": made(6, options.device), "student": made(3, options.device)}
    models |= in_bf16(models)
    batches = {size: random_batch(models["teacher"], (size, LENGTH), VOCABULARY) for size in BATCHES}
    rounds = []
    for _ in range(options.rounds):
        before, ours = time_theirs(models, batches, options.seconds), time_ours(models)
        rounds.append((before, ours, time_theirs(models, batches, options.seconds)))
    device = device_name(torch.device(options.device))
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {len(rounds)} rounds")
    print(f"{'':16}{'':8}{'theirs, ms':>12}{'ours / theirs':>26}{'theirs / theirs':>26}")
    for key in rounds[0][0]:
        theirs = statistics.median([before[key] for before, _, _ in rounds])
        ratios = [2 * ours[key] / (before[key] + after[key]) for before, ours, after in rounds]
        again = [after[key] / before[key] for before, _, after in rounds]
        print(f"{key[0]:16}{key[1]:8}{theirs:12.2f}{spread(ratios):>26}{spread(again):>26}")


if __name__ == "__main__":
    main()

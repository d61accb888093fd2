"""Measure how long training stands still for a checkpoint, and how long writing it takes.

    python scripts/benchmarks/checkpoint_stall.py
    OMP_NUM_THREADS=2 python scripts/benchmarks/checkpoint_stall.py --saves 6 --hidden 512 --layers 14

Trains a BERT of random weights (61 M parameters, so 737 MB of weights and moments) on the device that Accelerate finds,
once with checkpoints written behind training and once with them written in place, as where host memory does not hold a
copy. A save is due when the one before has long been written. The last one, which the end of training waits for, does
not count. Prints one JSON object; seconds are by the clock, medians over the saves but the first, which is apart.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers

from distill.losses import Objective
from distill.models.forward import Batch
from distill.ranks import process_state
from distill.recipe.schema import Term, Training
from distill.training import Job, train, writer
from distill.training.flight import Flight
from distill.training.loop import _Run
from distill.training.snapshot import HostMemory

VOCABULARY, LENGTH, EXAMPLES, CLASSES = 32768, 16, 2, 12


class SmallBatches:
    """One batch for every step, small: it is the checkpoints that are measured."""

    batch_size = micro_batch_size = EXAMPLES

    def __init__(self, begun: list[float]):
        ids = torch.randint(5, VOCABULARY, (EXAMPLES, LENGTH))
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros_like(ids[:, 0])}
        self.begun = begun

    def micro_batches_per_step(self) -> int:
        """As the trainer wants to know."""
        return 1

    def epoch_at(self, step: int) -> float:
        """There are none."""
        return float(step)

    def stream(
        self, start: int, stop: int, _rank: int, _world: int, _workers: int = 0
    ) -> Iterator[list[tuple[int, Batch]]]:
        """The steps, and when each begins."""
        for _ in range(start, stop):
            self.begun.append(time.monotonic())
            yield [(0, self.batch)]


class Measured:
    """What saves took: seconds that training stood still, also those of the CPU and of the copy in it, and writing."""

    def __init__(self):
        self.still: list[float] = []
        self.cpu: list[float] = []
        self.copy: list[float] = []
        self.writing: list[tuple[float, float]] = []
        self.plain = save, copy, run = _Run.save, HostMemory.copy, Flight.run

        def saving(training, *, newest):
            cpu = time.process_time()
            save(training, newest=newest)
            seconds = training.clock.last  # as the trainer itself counts them
            if newest:
                self.still.append(seconds)
                self.cpu.append(time.process_time() - cpu)
            return seconds

        def copying(memory, files):
            # A GPU copies while the host goes on, and only then what the host asks of it: here the host waits for it.
            wait = torch.cuda.synchronize if torch.cuda.is_available() else time.monotonic
            wait()
            start = time.monotonic()
            copied = copy(memory, files)
            wait()
            self.copy.append(time.monotonic() - start)
            return copied

        def running(flight):
            start = time.monotonic()
            run(flight)
            self.writing.append((start, time.monotonic()))

        _Run.save, HostMemory.copy, Flight.run = saving, copying, running

    def end(self) -> None:
        """Take itself out."""
        _Run.save, HostMemory.copy, Flight.run = self.plain

    def seconds_of_steps(self, begun: list[float], every: int) -> dict[str, float | None]:
        """Tell steps while a checkpoint was written from others; those with a save in them do not count."""
        times: dict[str, list[float]] = {"while a checkpoint is written": [], "otherwise": []}
        for number, (start, end) in enumerate(itertools.pairwise(begun), 1):
            if number % every:
                beside = any(start < finish and begin < end for begin, finish in self.writing)
                times["while a checkpoint is written" if beside else "otherwise"].append(end - start)
        return {when: statistics.median(each) if each else None for when, each in times.items()}


def measure(model, spec: Training) -> tuple[Measured, list[float]]:
    """Train; returns what saves took, and when the steps began."""
    measured, begun = Measured(), []
    with tempfile.TemporaryDirectory() as folder:
        objective = Objective([Term(match="labels")], "sequence")
        said = []
        job = Job("stall", spec, Path(folder), 0, {})
        train(job, model, objective, None, SmallBatches(begun), say=said.append)
    measured.end()
    print("\n".join(said), file=sys.stderr)
    return measured, begun


def main() -> int:
    """Measure both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--every", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=14)
    options = parser.parse_args()
    sizes = {"vocab_size": VOCABULARY, "hidden_size": options.hidden, "intermediate_size": 4 * options.hidden}
    config = transformers.BertConfig(
        **sizes, num_hidden_layers=options.layers, num_attention_heads=8, num_labels=CLASSES
    )
    spec = Training(steps=options.every * options.saves + 1, batch_size=EXAMPLES, save_every=options.every)
    model = transformers.BertForSequenceClassification(config)
    behind, begun = measure(model, spec)
    writer.free_memory = lambda: 0
    in_place, _ = measure(transformers.BertForSequenceClassification(config), spec)
    count = slice(1, -1)  # the first may wait for memory, the last is waited for
    writing = statistics.median([end - start for start, end in behind.writing][count])
    still, whole = (statistics.median(each.still[count]) for each in (behind, in_place))
    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "behind training: s that it stands still": still,
        "of these the copy": statistics.median(behind.copy[count]),
        "CPU s": statistics.median(behind.cpu[count]),
        "the first, s": behind.still[0],
        "s that the thread writes": writing,
        "in place: s that training stands still": whole,
        "in place, CPU s": statistics.median(in_place.cpu[count]),
        "standing still, share of what the thread writes": still / writing,
        "standing still, share of what it is in place": still / whole,
        "s per step": behind.seconds_of_steps(begun, options.every),
        "device": str(process_state().device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

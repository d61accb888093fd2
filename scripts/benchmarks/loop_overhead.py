"""Measure what the trainer costs beyond a bare loop over the same model, teacher, objective and batches; and saving.

    python scripts/benchmarks/loop_overhead.py
    python scripts/benchmarks/loop_overhead.py --rounds 6 --steps 12 --hidden 384

Both loops take turns in one process, each time from the same weights; steps are compared in CPU time, which other
programs on the machine disturb less than the clock. The student has 3 layers, the teacher 6, with logits and hidden
states matched, 4 micro-batches of 8 examples with up to 64 tokens. Prints one JSON object.
"""

import argparse
import copy
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

from distill.losses import LayerMap, Objective
from distill.models.forward import Batch
from distill.recipe.schema import Term, Training
from distill.teacher import LiveTeacher
from distill.training import Job, train
from distill.training.loop import _Run
from distill.training.model import DistillModel
from distill.training.optim import make_optimizer

CLASSES, VOCABULARY, LENGTH, MICRO, PER_STEP = 12, 8192, 64, 8, 4
WARM = 2
"""Steps at the start of each loop that are not counted."""


class Prepared:
    """Batches that are ready, and the CPU time at which each step asked for its own."""

    batch_size, micro_batch_size = MICRO * PER_STEP, MICRO

    def __init__(self, steps: int):
        generator = torch.Generator().manual_seed(0)
        self.steps = [[self._batch(generator) for _ in range(PER_STEP)] for _ in range(steps)]
        self.asked: list[float] = []

    def _batch(self, generator: torch.Generator) -> Batch:
        ids = torch.randint(5, VOCABULARY, (MICRO, LENGTH), generator=generator)
        mask = torch.ones_like(ids)
        mask[1::2, LENGTH // 2 :] = 0
        labels = torch.randint(CLASSES, (MICRO,), generator=generator)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def micro_batches_per_step(self) -> int:
        """As the trainer wants to know."""
        return PER_STEP

    def steps_for(self, epochs: float) -> int:
        """One pass is all there is."""
        return int(epochs * len(self.steps))

    def steps_for_tokens(self, tokens: int) -> int:
        """As `steps_for`."""
        return min(len(self.steps), tokens)

    def epoch_at(self, step: int) -> float:
        """Share of the steps."""
        return step / len(self.steps)

    def stream(
        self, start: int, stop: int, _rank: int, _world: int, _workers: int = 0
    ) -> Iterator[list[tuple[int, Batch]]]:
        """The steps, each asked for when the one before is done."""
        for step in range(start, stop):
            self.asked.append(time.process_time())
            yield list(enumerate(self.steps[step]))
        self.asked.append(time.process_time())

    def seconds(self) -> list[float]:
        """CPU time of each step that counts."""
        times = [after - before for before, after in zip(self.asked, self.asked[1:], strict=False)]
        self.asked = []
        return times[WARM:]


def bare(student, objective, teacher, batches: Prepared, spec: Training) -> None:
    """The loop that one would write by hand."""
    model = DistillModel(student, objective).train()
    optimizer = make_optimizer(model, spec)
    for step in batches.stream(0, spec.steps, 0, 1):
        counts = objective.counts([batch for _, batch in step])
        for _, batch in step:
            loss, _ = model(batch, teacher(batch), counts, 0.0)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def main() -> int:
    """Take turns, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=384)
    options = parser.parse_args()
    sizes = {"vocab_size": VOCABULARY, "hidden_size": options.hidden, "num_attention_heads": 12, "num_labels": CLASSES}
    make = transformers.BertForSequenceClassification
    config = transformers.BertConfig(**sizes, intermediate_size=4 * options.hidden, num_hidden_layers=6)
    large = make(config)
    small = make(transformers.BertConfig(**sizes, intermediate_size=2 * options.hidden, num_hidden_layers=3))
    terms = [Term(match="labels"), Term(match="logits", temperature=2.0), Term(match="hidden")]
    objective = Objective(terms, "sequence", lambda _policy: LayerMap(((0, 1), (1, 3), (2, 5))))
    teacher = LiveTeacher(large, objective.teacher, torch.device("cpu"))
    batches = Prepared(options.steps)
    spec = Training(steps=options.steps, batch_size=batches.batch_size, micro_batch_size=MICRO, save_every=0)
    ratios, ours, theirs, saves = [], [], [], []
    for _ in range(options.rounds):
        bare(copy.deepcopy(small), objective, teacher, batches, spec)
        theirs.append(statistics.median(batches.seconds()))
        with tempfile.TemporaryDirectory() as folder:
            saving = Timed()
            job = Job("overhead", spec, Path(folder), 0, {})
            train(job, copy.deepcopy(small), objective, teacher, batches, say=lambda _text: None)
        ours.append(statistics.median(batches.seconds()[:-1]))  # the last one saves
        saves.append(saving.end())
        ratios.append(ours[-1] / theirs[-1])
    step, save = statistics.median(ours), statistics.median(cpu for cpu, _ in saves)
    figures = {
        "bare step, CPU s": statistics.median(theirs),
        "trainer step, CPU s": step,
        "overhead, median over rounds": statistics.median(ratios) - 1,
        "overhead of each round": [ratio - 1 for ratio in ratios],
        "one checkpoint, CPU s": save,
        "one checkpoint, s": statistics.median(clock for _, clock in saves),
        "saving every 50 steps, share of CPU time": save / (50 * step),
        "parameters": sum(parameter.numel() for parameter in small.parameters()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(figures, indent=1))
    return 0


class Timed:
    """CPU time and time from the save of a checkpoint to its publication, which the end of training waits for."""

    def __init__(self):
        self.cpu = self.clock = 0.0
        self.plain = _Run.save, _Run.settle
        _Run.save, _Run.settle = (self._timed(function) for function in self.plain)

    def _timed(self, function):
        def wrapped(*arguments, **named):
            cpu, clock = time.process_time(), time.monotonic()
            result = function(*arguments, **named)
            self.cpu += time.process_time() - cpu
            self.clock += time.monotonic() - clock
            return result

        return wrapped

    def end(self) -> tuple[float, float]:
        """Both times; takes itself out."""
        _Run.save, _Run.settle = self.plain
        return self.cpu, self.clock


if __name__ == "__main__":
    sys.exit(main())

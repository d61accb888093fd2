"""Measure what the product costs beyond a bare loop over the same model, teacher, objective and batches.

    python scripts/benchmarks/loop_overhead.py
    python scripts/benchmarks/loop_overhead.py --rounds 5 --steps 30 --hidden 256
    python scripts/benchmarks/loop_overhead.py --device cuda

Both loops take turns in one process, each time from the same weights and with the same compiled layers, if any. The
student has half of the teacher's layers and half of its MLP; logits, hidden states and labels are matched, with 4
micro-batches a step and half of the rows half empty. Single steps are those between records; "end to end" has a record
every 10 steps and a checkpoint halfway and at the end. On a CPU ratios are also given of CPU time, which other programs
on the machine disturb less than the clock. Prints one JSON object.
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
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from accelerate import Accelerator

from distill.losses import LayerMap, Objective
from distill.models.forward import Batch, to_device
from distill.models.padding import mark_padding
from distill.recipe.schema import Term, Training
from distill.teacher import LiveTeacher
from distill.training import Job, read_records, train
from distill.training.compiled import compiled_layers
from distill.training.model import DistillModel
from distill.training.optim import make_optimizer

CLASSES, VOCABULARY, PER_STEP, LAYERS = 12, 8192, 4, 6
WARM = 2
"""Steps at the start of each loop that are not counted."""
USUAL = {"cpu": {"hidden": 384, "length": 64, "micro": 8}, "cuda": {"hidden": 1024, "length": 512, "micro": 16}}


class Prepared:
    """Batches that are ready, and the times at which each step asked for its own."""

    sizes: tuple[int, ...]

    def __init__(self, steps: int, rows: int, length: int, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        self.batch_size, self.micro_batch_size, self.sizes = rows * PER_STEP, rows, (length,)
        self.device = device
        shape = (rows, length)
        self.steps = [[self._batch(shape, generator) for _ in range(PER_STEP)] for _ in range(steps)]
        self.asked: list[tuple[float, float]] = []

    def _batch(self, shape: tuple[int, int], generator: torch.Generator) -> Batch:
        ids = torch.randint(5, VOCABULARY, shape, generator=generator)
        mask = torch.ones_like(ids)
        mask[1::2, shape[1] // 2 :] = 0
        labels = torch.randint(CLASSES, shape[:1], generator=generator)
        batch = mark_padding({"input_ids": ids, "attention_mask": mask, "labels": labels})
        return {name: each.pin_memory() for name, each in batch.items()} if self.device.type == "cuda" else batch

    def in_sizes(self) -> "Prepared":
        """All rows have one length."""
        return self

    def padding_added(self, _steps: int) -> float:
        """None is added."""
        return 0.0

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

    def stream(self, start: int, stop: int, *_how: object) -> Iterator[list[tuple[int, Batch]]]:
        """The steps, each asked for when the one before is done."""
        for step in range(start, stop):
            self._note()
            yield list(enumerate(self.steps[step]))
        self._note(wait=True)

    def _note(self, *, wait: bool = False) -> None:
        # Without waiting, but for the first step that counts and the end: a GPU works behind the host's back.
        if self.device.type == "cuda" and (wait or len(self.asked) == WARM):
            torch.cuda.synchronize()
        self.asked.append((time.perf_counter(), time.process_time()))

    def seconds(self) -> tuple[float, ...]:
        """From the first step that counts to the end, and of the median step: by the clock; the same in CPU time."""
        found = []
        for times in zip(*self.asked, strict=True):
            steps = [after - before for before, after in zip(times[WARM:], times[WARM + 1 :], strict=False)]
            found += [times[-1] - times[WARM], statistics.median(steps)]
        self.asked = []
        return tuple(found)


def bare(student, objective, teacher, batches: Prepared, spec: Training) -> None:
    """The loop that one would write by hand."""
    device = batches.device
    model = DistillModel(student.to(device), objective).to(device).train()
    optimizer = make_optimizer(model, spec)
    autocast = torch.autocast(device.type, torch.bfloat16) if spec.precision == "bf16" else nullcontext()
    models, accelerator = [student, teacher.model], Accelerator(cpu=device.type == "cpu")
    with compiled_layers(spec.compile, models, objective, accelerator, "bare", lambda _line: None):
        for step in batches.stream(0, spec.steps):
            counts = to_device(objective.counts([batch for _, batch in step]), device)
            for _, cpu_batch in step:
                batch = to_device(cpu_batch, device)
                with autocast:
                    loss, _ = model(batch, teacher(batch), counts, 0.0)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()


def main() -> int:
    """Take turns, and compare."""
    options = read_options()
    device = torch.device(options.device)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": options.hidden, "num_labels": CLASSES}
    sizes |= {"num_attention_heads": options.hidden // 32, "max_position_embeddings": options.length}
    make, shape = transformers.BertForSequenceClassification, transformers.BertConfig
    large = make(shape(**sizes, intermediate_size=4 * options.hidden, num_hidden_layers=LAYERS))
    small = make(shape(**sizes, intermediate_size=2 * options.hidden, num_hidden_layers=LAYERS // 2))
    terms = [Term(match="labels"), Term(match="logits", temperature=2.0), Term(match="hidden")]
    objective = Objective(terms, "sequence", lambda _policy: LayerMap(((0, 1), (1, 3), (2, 5))))
    teacher = LiveTeacher(large, objective.teacher, device)
    batches = Prepared(options.steps, options.micro, options.length, device)
    precision = "bf16" if device.type == "cuda" else "fp32"
    steps = {"steps": options.steps, "batch_size": batches.batch_size, "micro_batch_size": options.micro}
    spec = Training(**steps, save_every=options.steps // 2, log_every=10, precision=precision)
    pairs, saves = [], []
    for _ in range(options.rounds):
        bare(copy.deepcopy(small), objective, teacher, batches, spec)
        theirs = batches.seconds()
        with tempfile.TemporaryDirectory() as folder:
            job = Job("overhead", spec, Path(folder), 0, {})
            train(job, copy.deepcopy(small), objective, teacher, batches, say=lambda _text: None)
            ours = batches.seconds()
            records = read_records(Path(folder) / "metrics.jsonl")
        saves.append(sum(record.get("save_seconds", 0.0) for record in records))
        pairs.append((theirs, ours))
    print(json.dumps(figures(pairs, saves, options.steps - WARM, device) | about(small, device), indent=1))
    return 0


def read_options() -> argparse.Namespace:
    """Sizes follow the device where they are not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(USUAL), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    for name in USUAL["cpu"]:
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    for name, size in USUAL[options.device].items():
        setattr(options, name, getattr(options, name) or size)
    return options


def figures(pairs: list, saves: list[float], steps: int, device: torch.device) -> dict[str, object]:
    """Medians over the rounds, of ratios within a round."""
    found: dict[str, object] = {}
    for offset, unit in enumerate(["s", "CPU s"] if device.type == "cpu" else ["s"]):
        for place, what in ((1, "one step"), (0, f"{steps} steps end to end")):
            each = [(theirs[2 * offset + place], ours[2 * offset + place]) for theirs, ours in pairs]
            found[f"{what}, bare, {unit}"] = statistics.median(theirs for theirs, _ in each)
            found[f"{what}, product, {unit}"] = statistics.median(ours for _, ours in each)
            found[f"{what}, bare / product, {unit}"] = statistics.median(theirs / ours for theirs, ours in each)
    return {**found, "rounds": len(pairs), "training stood still for one checkpoint, s": statistics.median(saves)}


def about(small: torch.nn.Module, device: torch.device) -> dict[str, object]:
    """What was measured, and where."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    parameters = sum(parameter.numel() for parameter in small.parameters())
    return {"parameters": parameters, "device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


if __name__ == "__main__":
    sys.exit(main())

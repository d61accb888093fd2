"""What is lost when a teacher's likely tokens and the mass of all others stand for its whole distribution.

    distill train recipes/smollm2-text/recipe.yaml --out runs/smollm2-text
    python scripts/benchmarks/likely_tokens.py recipes/smollm2-text/recipe.yaml --run runs/smollm2-text

For each k, over the positions of held-out texts that predict a token: the mass of the tail, the KL over k + 1 classes
and its share of the KL over the vocabulary, what packing adds to it, and how far the gradient is off: its cosine with
the exact one and the relative distance from it, by the student's logits and by what its head reads. `bytes` are those
of a token in a cache. The last columns are the time of packing and unpacking, microseconds per token, best of five.
"""

from __future__ import annotations

import argparse
import timeit
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.batches import evaluation_batches
from distill.losses import LOGITS, PREDICTION_KINDS
from distill.losses.align import Positions
from distill.losses.chunked import chunks
from distill.models.forward import Batch, Capture, forward
from distill.models.topk import TopK
from distill.pipeline import RunDir, Session
from distill.recipe import load_recipe
from distill.teacher.topk import bytes_per_token, pack, unpack


def main() -> None:
    """Print one table for each arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--run", type=Path, required=True, help="its run folder, after `distill train`")
    parser.add_argument("--arms", nargs="+", default=["cut", "distilled"])
    parser.add_argument("--tokens", type=int, default=2048, help="at least so many held-out tokens are predicted")
    parser.add_argument("--k", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--loss", choices=LOGITS, default="forward_kl")
    options = parser.parse_args()
    base = options.recipe.absolute().parent
    session = Session(load_recipe(options.recipe), base, RunDir(options.run.absolute()), print)
    capture = Capture(stop_at_head=True)
    teacher = session.live_teacher(capture)
    for arm in options.arms:
        student = session.load(session.arm_folder(arm)).eval()
        found = Sums(options)
        for batch in evaluation_batches(session.corpus, session.corpus.test, 2):
            with torch.no_grad():
                outputs = forward(student, batch, capture), teacher(batch)
            compare(found, session, outputs, batch)
            if found.tokens >= options.tokens:
                break
        found.report(arm)


class Sums:
    """Sums over tokens, by k."""

    def __init__(self, options: argparse.Namespace):
        self.k, self.loss, self.tokens = options.k, LOGITS[options.loss], 0
        self.total: dict[Any, float] = defaultdict(float)
        self.last: dict[int, TopK] = {}
        self.vocabulary = 0

    def add(self, student: Tensor, teacher: Tensor, weight: Tensor) -> None:
        """Add a chunk: logits of both [n, V], and the weight of the student's head [V, D]."""
        self.tokens += len(student)
        self.vocabulary = vocabulary = teacher.shape[-1]
        exact = self.slope("exact", student, teacher)
        read = exact @ weight
        self.total["exact", "square"] += exact.square().sum().item()
        self.total["exact", "read square"] += read.square().sum().item()
        self.total["entropy"] += -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum().item()
        for k in self.k:
            kept = self.last[k] = TopK.of(teacher, k)
            stored = unpack(pack(kept, vocabulary), k, vocabulary)
            self.total[k, "tail"] += kept.log_probabilities[:, -1].exp().sum().item()
            self.total[k, "unpacked"] += self.loss(student, kept).sum().item()
            slope = self.slope(k, student, stored)
            for name, one, other in (("", slope, exact), ("read ", slope @ weight, read)):
                self.total[k, f"{name}square"] += one.square().sum().item()
                self.total[k, f"{name}product"] += (one * other).sum().item()
                self.total[k, f"{name}distance"] += (one - other).square().sum().item()

    def slope(self, name: Any, student: Tensor, teacher: Any) -> Tensor:
        """Give the derivative of the loss by the student's logits, and add its value."""
        leaf = student.clone().requires_grad_()
        value = self.loss(leaf, teacher).sum()
        self.total[name, "loss"] += value.item()
        (slope,) = torch.autograd.grad(value, leaf)
        return slope

    def report(self, arm: str) -> None:
        """Print the table."""
        total, exact = self.total, self.total["exact", "loss"] / self.tokens
        entropy = total["entropy"] / self.tokens
        print(f"\n{arm}, {self.tokens} tokens: {exact:.5f} nats, the teacher's entropy is {entropy:.2f} nats\n")
        heads = "k bytes tail nats lost lost,_% packing cosine,_logits distance cosine,_hidden distance pack unpack"
        print(f"| {heads.replace(' ', ' | ').replace('_', ' ')} |\n{'|---:' * len(heads.split())}|")
        for k in self.k:
            mean = {name: total[k, name] / self.tokens for name in ("loss", "unpacked", "tail")}
            lost = exact - mean["unpacked"]
            size_of_one = bytes_per_token(k, self.vocabulary)
            cells = [f"{k}", f"{size_of_one}", f"{mean['tail']:.4f}", f"{mean['unpacked']:.5f}", f"{lost:.5f}"]
            cells += [f"{100 * lost / exact:.2f}", f"{mean['loss'] - mean['unpacked']:+.1e}"]
            for name in ("", "read "):
                size = total["exact", f"{name}square"] ** 0.5
                cosine = total[k, f"{name}product"] / (size * total[k, f"{name}square"] ** 0.5)
                cells += [f"{cosine:.5f}", f"{total[k, f'{name}distance'] ** 0.5 / size:.4f}"]
            cells += [f"{each:.1f}" for each in self.times(k)]
            print(f"| {' | '.join(cells)} |", flush=True)

    def times(self, k: int, tokens: int = 4096) -> tuple[float, float]:
        """Time packing and unpacking, microseconds per token."""
        index = torch.arange(tokens) % len(self.last[k].ids)
        kept = self.last[k][index]
        rows = pack(kept, self.vocabulary)
        packing = timeit.repeat(lambda: pack(kept, self.vocabulary), number=1)
        unpacking = timeit.repeat(lambda: unpack(rows, k, self.vocabulary), number=1)
        return 1e6 * min(packing) / tokens, 1e6 * min(unpacking) / tokens


def compare(found: Sums, session: Session, outputs: tuple[Any, Any], batch: Batch) -> None:
    """Add the positions of a batch that predict a token."""
    kind = PREDICTION_KINDS[session.corpus.head]
    positions = Positions.of(kind.predicted(batch))
    student, teacher = (kind.select(side, batch, positions) for side in outputs)
    tokens = slice(session.vocabulary)
    for _, (own, target) in chunks([student, teacher]):
        found.add(own[:, tokens], target[:, tokens], student.head.weight[tokens].float())


if __name__ == "__main__":
    main()

"""Rows to batches: sources, splits, tasks, and an order that is a pure function of the step."""

from distill.data.batches import TrainingBatches, collate, evaluation_batches, observe_batch
from distill.data.corpus import Corpus, load_corpus
from distill.data.tasks import TASKS

__all__ = [
    "TASKS",
    "Corpus",
    "TrainingBatches",
    "collate",
    "evaluation_batches",
    "load_corpus",
    "observe_batch",
]

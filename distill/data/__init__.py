"""Rows to batches: sources, splits, tasks, and an order that is a pure function of the step."""

from distill.data.batches import TrainingBatches, collate, evaluation_batches, observe_batch
from distill.data.corpus import Corpus, Examples, load_corpus
from distill.data.prepare import prepare
from distill.data.rows import Order
from distill.data.tasks import TASKS, Task

__all__ = [
    "TASKS",
    "Corpus",
    "Examples",
    "Order",
    "Task",
    "TrainingBatches",
    "collate",
    "evaluation_batches",
    "load_corpus",
    "observe_batch",
    "prepare",
]

"""Texts to batches: sources, tasks, the split, and an order that is a pure function of the step."""

from distill.data.batches import TrainingBatches, collate, evaluation_batches
from distill.data.corpus import Corpus, Texts, load_corpus, read_texts, save_corpus, tokenise
from distill.data.tasks import TASKS

__all__ = [
    "TASKS",
    "Corpus",
    "Texts",
    "TrainingBatches",
    "collate",
    "evaluation_batches",
    "load_corpus",
    "read_texts",
    "save_corpus",
    "tokenise",
]

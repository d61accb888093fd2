"""Training: the loop, its checkpoints and its logs. Loss, teacher, data and masks are given to it, not imported."""

from distill.training.checkpoint import TrainState
from distill.training.loop import Job, train
from distill.training.setup import make_accelerator
from distill.training.tracking import read_records

__all__ = ["Job", "TrainState", "make_accelerator", "read_records", "train"]

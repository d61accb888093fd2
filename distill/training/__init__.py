"""Training: the loop, its checkpoints and its logs. Loss, teacher, data and masks are given to it, not imported."""

from distill.training.loop import Job, train
from distill.training.tracking import read_records

__all__ = ["Job", "read_records", "train"]

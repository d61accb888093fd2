"""Training: the loop, its checkpoints and what it tells. It receives callables and never imports losses or teachers."""

from distill.training.checkpoint import TrainState
from distill.training.loop import Job, TrainDir, train
from distill.training.setup import make_accelerator
from distill.training.tracking import read_records

__all__ = ["Job", "TrainDir", "TrainState", "make_accelerator", "read_records", "train"]

"""A training of a tiny model on a tiny corpus, for every test of the trainer."""

from __future__ import annotations

import torch
from tiny import tiny_model

from distill.data import TrainingBatches
from distill.losses import Objective, layer_map
from distill.recipe.schema import Term, Training
from distill.teacher import LiveTeacher
from distill.training import Job, train
from distill.training.checkpoint import Checkpoints
from distill.training.writer import CheckpointWriter

LABELS = [Term(match="labels")]
HIDDEN = [
    Term(match="logits", temperature=2.0, schedule={"temperature": 1.0}),
    Term(match="hidden", map=[(1, 0), (3, 3)], schedule={"weight": 0.0}),
]


MADE_FROM = {"data": "a tiny corpus", "seed": 0}
"""Inputs that every training here says it is made from."""


def published(folder):
    return Checkpoints(folder, MADE_FROM, print).published()


def save(checkpoints, state, tensors):
    """Publish a checkpoint, and wait for it; returns its folder."""
    writer = CheckpointWriter(checkpoints, print)
    writer.save([checkpoints], state, tensors, whole=False)
    writer.settle()
    return checkpoints.folder / f"step-{state.step:08d}"


def dropped(rate):
    return {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}


def run(
    corpus, folder, *, micro=4, steps=6, dropout=0.1, seed=0, model=None, teacher=None, wide=None, job=None, **spec
):
    """Train on the labels; returns (model, what was said). `spec` are keys of `training`, `job` fields of Job.

    `evaluate` may be among those of the job.

    `wide` is a teacher of another width, whose hidden states are matched through projections instead.
    """
    usual = {"steps": steps, "batch_size": 8, "micro_batch_size": micro, "lr": 1e-3, "save_every": 2, "log_every": 2}
    spec = Training(**usual | spec)
    model = model or tiny_model("bert", **dropped(dropout), num_labels=len(corpus.classes))
    head = corpus.task.head
    batches = TrainingBatches(corpus, corpus.labelled or range(len(corpus.train)), spec.batch_size, micro, seed)
    extra = dict(job or {})
    evaluate = extra.pop("evaluate", None)
    job = Job("test", spec, folder, seed, MADE_FROM, **extra)
    said: list[str] = []
    objective = Objective(LABELS, head)
    if wide is not None:
        objective = Objective(HIDDEN, "sequence", lambda policy: layer_map(policy, None, 4, 4))
        objective.project(model.config.hidden_size, wide.config.hidden_size)
        teacher = LiveTeacher(wide, objective.teacher, torch.device("cpu"))
    train(job, model, objective, teacher, batches, evaluate=evaluate, say=said.append)
    return model, said

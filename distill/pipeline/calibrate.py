"""Stage `calibrate`: one pass of the teacher over a sample; every score reads its result."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import reduce

from distill.errors import InputError
from distill.losses import label_loss
from distill.models.causal import check_causal
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage
from distill.ranks import process_state
from distill.student import calibrate, check_student
from distill.student.plan import wanted_statistics


def work(session: Session) -> None:
    """Collect the statistics over the sample, shared out over the ranks."""
    student, kind, state = session.recipe.student, session.corpus.head, process_state()
    spec, wanted, shares = student.calibration, wanted_statistics(student), session.shares()
    if shares is None:
        return

    def add_over_ranks(total: torch.Tensor) -> torch.Tensor:
        return total if shares[1] == 1 else reduce(total.to(state.device), reduction="sum")

    batches = session.batches(range(spec.examples), spec.batch_size, *shares)
    teacher = session.live_teacher(whole=session.recipe.teacher.device == "sharded" or wanted.gradients)
    check_student(teacher.model, student)
    if session.kind.causal:
        check_causal(teacher.model)
    loss, sets = label_loss(kind), kind == "multi_label"
    statistics = calibrate(teacher.model, batches, wanted, loss, add_over_ranks, sets, teacher.precision)
    if state.is_main_process:
        statistics.save(session.folder.calibration)


def inputs(session: Session) -> dict[str, Any]:
    """List teacher, data, sample size and what is collected."""
    student = session.recipe.student
    return {
        "teacher": session.teacher_inputs(),
        "data": session.corpus.fingerprint,
        "examples": student.calibration.examples,
        "collected": vars(wanted_statistics(student)),
    }


def check(session: Session) -> None:
    """Refuse gradients of a head that gives a number: there is no class to draw."""
    if session.corpus.head == "regression" and wanted_statistics(session.recipe.student).gradients:
        raise InputError(
            "student.mlp.score: the labels are numbers, and gradients are taken of a head with classes; choose a score "
            "that reads none, e.g. activation, and leave out student.calibration.gradients"
        )


STAGE = Stage(
    "calibrate",
    work,
    inputs,
    lambda session: [session.folder.calibration],
    wanted=lambda recipe: recipe.student.given is None,
    together=True,
    check_data=check,
)

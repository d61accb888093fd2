"""Stage `calibrate`: one pass of the teacher over a sample; every score reads its result."""

from __future__ import annotations

from functools import partial
from typing import Any

from accelerate.utils import reduce

from distill.data import collate
from distill.losses import label_loss
from distill.models.load import folder_fingerprint
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage, results
from distill.ranks import process_state
from distill.student import calibrate, check_target, wanted_statistics


def work(session: Session) -> None:
    """Collect the statistics over the sample, shared out over the processes."""
    student, corpus, state = session.recipe.student, session.corpus, process_state()
    spec = student.calibration
    sample = range(min(spec.examples, len(corpus.train)))
    starts = sample[:: spec.batch_size][state.process_index :: state.num_processes]
    batches = (collate(corpus, corpus.train, sample[start : start + spec.batch_size]) for start in starts)
    teacher = session.load(session.teacher).to(state.device)
    check_target(teacher, student)
    added = partial(reduce, reduction="sum")
    statistics = calibrate(teacher, batches, wanted_statistics(student), label_loss(corpus.task.head), added)
    if state.is_main_process:
        statistics.save(session.run.calibration)


def inputs(session: Session) -> dict[str, Any]:
    """Teacher, data, sample size and what is collected."""
    student = session.recipe.student
    return {
        "teacher": folder_fingerprint(session.teacher),
        "data": session.corpus.fingerprint,
        "examples": student.calibration.examples,
        "collected": vars(wanted_statistics(student)),
    }


STAGE = Stage("calibrate", work, inputs, results(lambda run: run.calibration), together=True)

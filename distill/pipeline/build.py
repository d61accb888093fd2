"""Stage `build`: cut the student, and prove that what is cut is all that changes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data import collate
from distill.errors import InputError
from distill.files import content_of
from distill.models.family import layers_of
from distill.models.forward import MODEL_INPUTS, Batch, Capture, forward
from distill.models.load import folder_fingerprint
from distill.models.plan import StudentPlan
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage
from distill.pipeline.train import save_model
from distill.recipe.schema import Student
from distill.release.formats import format_of
from distill.student import build_student, plan_student

PROBES, PROBE_LENGTH = 4, 64
"""Training examples on which the student that keeps everything is compared with the teacher, and tokens of each; the
logits of a few long texts over a large vocabulary would take gigabytes."""
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Largest gap of logits, as a share of the largest logit, that another order of sums explains."""
HALF_ROUNDING = 0.03
"""The same for half precision."""


def work(session: Session) -> None:
    """Build the student that the plan describes, once a student that keeps everything is the teacher."""
    teacher, corpus = session.load(session.teacher), session.corpus
    size, free = sum(tensor.nbytes for tensor in teacher.state_dict().values()), _free_memory()
    if size < free:
        batch = collate(corpus, corpus.train, range(min(PROBES, len(corpus.train))))
        check_keeps_all(teacher, {name: batch[name][:, :PROBE_LENGTH] for name in MODEL_INPUTS if name in batch})
    else:
        session.say(
            f"  not checked that keeping everything gives the teacher's logits: a second copy of the teacher "
            f"({size / 1e9:.1f} GB) does not fit into the free memory ({free / 1e9:.1f} GB)"
        )
    student = build_student(teacher, StudentPlan.load(session.folder.plan))
    format_of(student, session.recipe.release.format)  # refused before it is trained
    save_model(session, student, session.folder.student)


def plan_of_all(teacher: Any) -> StudentPlan:
    """Plan a student that keeps every layer and neuron."""
    layers = {"keep": list(range(len(layers_of(teacher))))}
    mlp = {"keep": 1.0, "multiple_of": 1, "score": "random"}  # nothing is ranked, so the cheapest score will do
    return plan_student(teacher, Student.model_validate({"layers": layers, "mlp": mlp}))


@torch.no_grad()
def check_keeps_all(teacher: Any, batch: Batch) -> None:
    """Refuse a teacher whose logits a student that keeps every layer and neuron does not give.

    Then something decides about its output that the knife does not know, and every student would lack it.

    Args:
        teacher: On the CPU, in its stored dtype.
        batch: A few real examples.

    Raises:
        InputError: With the largest gap.
    """
    given = _logits(teacher, batch)
    kept = _logits(build_student(teacher, plan_of_all(teacher)), batch)
    if torch.equal(given, kept):
        return
    gap, largest = (given - kept).abs().max().item(), given.abs().max().item()
    if not gap <= ROUNDING.get(teacher.dtype, HALF_ROUNDING) * largest:
        raise InputError(
            f"a student that keeps every layer and neuron of this {teacher.config.model_type} does not give the "
            f"teacher's logits on the data: they differ by up to {gap:.3g}, where the largest is {largest:.3g}; "
            f"models of this kind cannot be cut"
        )


def _logits(model: Any, batch: Batch) -> Tensor:
    logits = forward(model, batch, Capture()).logits
    assert logits is not None, "nothing is stopped at the head"
    return logits.float()


def _free_memory() -> int:
    """Return the bytes of main memory that new work can have without swapping; those of the machine where unknown."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, LookupError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def inputs(session: Session) -> dict[str, Any]:
    """List teacher and plan."""
    return {"teacher": folder_fingerprint(session.teacher), "plan": content_of(session.folder.plan)}


STAGE = Stage("build", work, inputs, lambda session: [session.folder.student])

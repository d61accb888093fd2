"""Stage `build`: cut the student."""

from __future__ import annotations

from typing import Any

from distill.files import content_of
from distill.models.load import folder_fingerprint
from distill.models.plan import StudentPlan
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage, results
from distill.pipeline.train import save_model
from distill.release.formats import format_of
from distill.student import build_student


def work(session: Session) -> None:
    """Build the student that the plan describes."""
    student = build_student(session.load(session.teacher), StudentPlan.load(session.run.plan))
    format_of(student, session.recipe.release.format)  # refused before it is trained
    save_model(session, student, session.run.student)


def inputs(session: Session) -> dict[str, Any]:
    """Teacher and plan."""
    return {"teacher": folder_fingerprint(session.teacher), "plan": content_of(session.run.plan)}


STAGE = Stage("build", work, inputs, results(lambda run: run.student))

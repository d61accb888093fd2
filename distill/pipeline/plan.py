"""Stage `plan`: decide which layers and neurons the student keeps."""

from __future__ import annotations

from typing import Any

from distill.files import content_of, write_text
from distill.pipeline.compatible import check_members, check_vocabularies, probe_tokenizers
from distill.pipeline.given_student import given_inputs, plan_given
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage
from distill.student import Statistics, plan_student
from distill.student.plan import check_strategies


def work(session: Session) -> None:
    """Plan the student from the calibration's statistics, and say what was asked and what was got."""
    if session.recipe.student.given is not None:
        write_text(session.folder.plan, plan_given(session).to_json())
        return
    statistics = Statistics.load(session.folder.calibration)
    teacher = session.live_teacher(whole=True)
    decided = plan_student(teacher.model, session.recipe.student, statistics)
    write_text(session.folder.plan, decided.to_json())
    for key, outcome in decided.outcomes.items():
        reason = f" ({outcome.reason})" if outcome.reason else ""
        session.say(f"  {key}: asked {outcome.asked}, got {outcome.got}{reason}")


def inputs(session: Session) -> dict[str, Any]:
    """List teacher, statistics and policies; or what a given student is described by."""
    if session.recipe.student.given is not None:
        return given_inputs(session)
    return {
        "teacher": session.teacher_inputs(),
        "calibration": content_of(session.folder.calibration),
        "student": session.recipe.student.model_dump(mode="json", exclude={"calibration", "repair", "mask"}),
    }


def check(session: Session) -> None:
    """Find every policy, score and allocation that the recipe names, and look at the models beside the first."""
    check_strategies(session.recipe.student)
    check_vocabularies(session)


def check_data(session: Session) -> None:
    """Try the tokenizers on the data, and look at the classes of every teacher."""
    probe_tokenizers(session)
    check_members(session)


STAGE = Stage("plan", work, inputs, lambda session: [session.folder.plan], check=check, check_data=check_data)

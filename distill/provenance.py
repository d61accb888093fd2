"""What each result depends on: a stage runs again when, and only when, one of these changed.

Everything is named by content: weights and files by their sha256, data by its tokens and labels, settings by value.
"""

from __future__ import annotations

from typing import Any

from distill import __version__
from distill.models.load import folder_fingerprint
from distill.recipe.load import fingerprint
from distill.recipe.schema import Optimization
from distill.rundir import content_of
from distill.session import Session
from distill.student import wanted_statistics

CADENCE = {"save_every", "log_every", "evaluate_every", "keep_best", "trackers"}
MEANS = {"loader_workers", "gradient_checkpointing"}
"""Keys that say when to look or by what means, not what to compute: changing them neither reruns a stage nor voids a
checkpoint."""


def identity(inputs: dict[str, Any]) -> str:
    """Fingerprint of what a result is made from, this version of distill included."""
    return fingerprint({"distill": __version__, "from": inputs})


def _settings(spec: Optimization) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude=CADENCE | MEANS)


def teacher_inputs(session: Session) -> dict[str, Any]:
    """Source weights, data, and how they are fitted."""
    spec = session.recipe.teacher
    return {
        "source": folder_fingerprint(session.source),
        "init": spec.init,
        "fit": _settings(spec.fit) if spec.fit else None,
        "data": session.corpus.fingerprint,
        "seed": session.recipe.seed,
    }


def calibration_inputs(session: Session) -> dict[str, Any]:
    """Teacher, data, sample size and what is collected."""
    spec, wanted = session.recipe.student.calibration, wanted_statistics(session.recipe.student)
    return {**_teacher_and_data(session), "examples": spec.examples, "collected": vars(wanted)}


def _teacher_and_data(session: Session) -> dict[str, Any]:
    return {"teacher": folder_fingerprint(session.teacher), "data": session.corpus.fingerprint}


def plan_inputs(session: Session) -> dict[str, Any]:
    """Teacher, statistics and policies."""
    return {
        "teacher": folder_fingerprint(session.teacher),
        "calibration": content_of(session.run.calibration),
        "student": session.recipe.student.model_dump(mode="json", exclude={"calibration", "repair", "mask"}),
    }


def build_inputs(session: Session) -> dict[str, Any]:
    """Teacher and plan."""
    return {"teacher": folder_fingerprint(session.teacher), "plan": content_of(session.run.plan)}


def repair_inputs(session: Session) -> dict[str, Any]:
    """Student and teacher, the plan between them, both samples, and the steps."""
    spec = session.recipe.student
    return {
        **_teacher_and_data(session),
        "student": folder_fingerprint(session.run.student),
        "plan": content_of(session.run.plan),
        "examples": spec.calibration.examples,
        "repair": spec.repair.model_dump(mode="json"),
    }


def training_inputs(session: Session) -> dict[str, Any]:
    """Student, teacher, data, loss and settings."""
    return {
        **control_inputs(session),
        **_teacher_and_data(session),
        "plan": content_of(session.run.plan),
        "losses": [term.model_dump(mode="json") for term in session.recipe.losses],
        "teacher_dtype": session.recipe.teacher.dtype,
    }


def control_inputs(session: Session) -> dict[str, Any]:
    """Student, data and settings; the teacher has no say."""
    return {
        "student": folder_fingerprint(session.start),
        "mask": _mask(session),
        "data": session.corpus.fingerprint,
        "training": _settings(session.recipe.training),
        "seed": session.recipe.seed,
    }


def _mask(session: Session) -> dict[str, Any] | None:
    mask, mlp = session.recipe.student.mask, session.recipe.student.mlp
    # `multiple_of` says how far `compact` may go.
    return {**mask.model_dump(mode="json"), "multiple_of": mlp.multiple_of} if mask else None


def evaluation_inputs(session: Session) -> dict[str, Any]:
    """Every arm's weights, the data and what is measured."""
    spec, training = session.recipe.evaluation, session.recipe.training
    return {
        "arms": {arm: folder_fingerprint(session.arm_folder(arm)) for arm in session.arms},
        **_teacher_and_data(session),
        "student": folder_fingerprint(session.run.distilled),
        "mask": [_mask(session), _settings(training)] if session.recipe.student.mask else None,
        "max_length": session.recipe.data.max_length,
        "evaluation": spec.model_dump(mode="json"),
    }


def release_inputs(session: Session) -> dict[str, Any]:
    """The distilled student, its evidence and the recipe."""
    run = session.run
    files = [run.distilled, run.plan, run.evaluation, run.training.metrics, run.control("labels_only").metrics]
    files += [run.repair] if session.recipe.student.repair.wanted else []
    return {"files": [content_of(path) for path in files], "recipe": session.recipe.model_dump(mode="json")}

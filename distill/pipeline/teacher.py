"""Stage `teacher`: fine-tune the teacher on the recipe's labels, so that it has something to teach about them."""

from __future__ import annotations

from typing import Any

from distill.evaluation.arms import LABELS_ONLY
from distill.losses import Objective
from distill.models.causal import check_causal
from distill.models.load import folder_fingerprint
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage, settings_of, with_version
from distill.pipeline.train import fit_of, save_model, train_model
from distill.ranks import process_state
from distill.student import check_student
from distill.training import Job


def work(session: Session) -> None:
    """Fit the source teacher, or random weights of its shape."""
    recipe, device = session.recipe, session.near(process_state().device)
    model = session.load_to_fit(session.source, device, random=recipe.teacher.init == "random")
    check_student(model, recipe.student)
    if session.kind.causal:
        check_causal(model)
    made_from, changed = with_version(inputs(session)), session.continue_changed
    job = Job("teacher", fit_of(recipe), session.folder.fit, recipe.seed, made_from, continue_changed=changed)
    train_model(session, job, model, Objective(LABELS_ONLY, session.corpus.head), None)
    save_model(session, model, session.folder.teacher)


def inputs(session: Session) -> dict[str, Any]:
    """List source weights, data, and the settings of the fit."""
    spec = session.recipe.teacher
    return {
        "source": folder_fingerprint(session.source),
        "init": spec.init,
        "fit": settings_of(spec.fit) if spec.fit else None,
        "data": session.corpus.fingerprint,
        "seed": session.recipe.seed,
    }


STAGE = Stage(
    "teacher",
    work,
    inputs,
    lambda session: [session.folder.teacher],
    wanted=lambda recipe: recipe.teacher.fit is not None,
    together=True,
)

"""Stage `teacher`: fine-tune the teacher on the recipe's labels, so that it has something to teach about them."""

from __future__ import annotations

from typing import Any

from distill.evaluation.arms import LABELS_ONLY
from distill.losses import PREDICTION_KINDS, Objective
from distill.models.causal import check_causal
from distill.models.load import folder_fingerprint, grow_embeddings, load_model, random_model
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage, settings_of, with_version
from distill.pipeline.train import save_model, train_model
from distill.ranks import process_state
from distill.recipe.load import check_teacher
from distill.recipe.locate import teacher_folder
from distill.recipe.schema import Training
from distill.student import check_student
from distill.training import Job


def work(session: Session) -> None:
    """Fit the source teacher, or random weights of its shape."""
    spec, seed, code = session.recipe.teacher.fit, session.recipe.seed, session.remote_code
    assert spec is not None, "the stage is not wanted without `teacher.fit`"
    device = session.near(process_state().device)
    if session.recipe.teacher.init == "random":
        model = random_model(session.source, session.head, seed, code, device, session.say_once)
    else:
        model = load_model(
            session.source,
            session.head,
            allow_untrained_head=True,
            random_seed=seed,
            remote_code=code,
            device=device,
            say=session.say_once,
        )
    grow_embeddings(model, session.tokenizer, session.task.added_tokens, seed, session.say)
    check_student(model, session.recipe.student)
    if PREDICTION_KINDS[session.corpus.head].causal:
        check_causal(model)
    made_from, changed = with_version(inputs(session)), session.continue_changed
    training = Training(**spec.model_dump(exclude_unset=True))
    job = Job("teacher", training, session.folder.fit, seed, made_from, continue_changed=changed)
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


def check(session: Session) -> None:
    """Look at a teacher from the hub, which nobody could when the recipe was read.

    Raises:
        InputError: With everything that is wrong with it or does not fit it.
    """
    if teacher_folder(session.recipe.teacher.model, session.base) is None:
        check_teacher(session.recipe, session.source)


STAGE = Stage(
    "teacher",
    work,
    inputs,
    lambda session: [session.folder.teacher],
    wanted=lambda recipe: recipe.teacher.fit is not None,
    together=True,
    check=check,
)

"""A student that is given (`student.from`): described by a plan, and copied to where a cut one would lie."""

from __future__ import annotations

from typing import Any

import torch

from distill.errors import InputError
from distill.losses import Objective
from distill.models.causal import check_causal
from distill.models.family import use_eager_attention
from distill.models.forward import forward, takes_token_types
from distill.models.load import folder_fingerprint, hollow_model, trained_labels
from distill.models.plan import StudentPlan
from distill.pipeline.compatible import check_same_classes
from distill.pipeline.data import NAMELESS
from distill.pipeline.release_forms import try_forms
from distill.pipeline.session import Session
from distill.pipeline.train import maps_of, save_model
from distill.release.formats import format_of
from distill.student.given import describe_student

KEY = "student.from"
TRIED = 2
"""Training examples on which every term of the loss is tried."""


def plan_given(session: Session) -> StudentPlan:
    """Describe the student, and say what its layers are compared with."""
    teacher, student = (hollow_model(each, session.remote_code) for each in (session.teacher, session.folder_of(KEY)))
    plan = describe_student(teacher, student, _released_plan(session))
    assert plan.given is not None, "it is described as given"
    name, families = session.recipe.student.from_, f"a {plan.given.model_type} of {len(plan.layers)} layers"
    widths = f"{plan.given.hidden_size} wide, the teacher's {plan.given.teacher_hidden_size}"
    session.say(f"  student.from: {name} is {families}, {widths}")
    pairs = ", ".join(str(layer) for layer in plan.kept_layers)
    how = "as its plan.json says" if plan.given.map == "plan" else "by an even rule, as nothing was cut"
    session.say(f"  its layers are paired with layers {pairs} of the teacher {how}; map: plan means these")
    main, encoder = maps_of(plan)
    Objective(session.recipe.losses, session.corpus.head, main, encoder_maps=encoder)  # pairs that are not there
    return plan


def _released_plan(session: Session) -> StudentPlan | None:
    """Read the plan of an earlier run beside the student; None where there is none of ours."""
    path = session.folder_of(KEY) / "plan.json"
    if not path.is_file():
        return None
    try:
        return StudentPlan.load(path)
    except InputError:
        session.say(f"  {path} is no plan of distill, and not read")
        return None


def build_given(session: Session) -> None:
    """Copy the student into the run folder, with the task's head, once every term of the loss can be computed."""
    source = session.folder_of(KEY)
    names, classes = trained_labels(source), session.corpus.classes
    if len(names) == len(classes) and not all(map(NAMELESS.fullmatch, names)):
        check_same_classes(names, classes, KEY, "the run")
    student, teacher = session.load_to_fit(source), session.load(session.teacher)
    for each in (teacher, student) if session.kind.causal else ():
        check_causal(each)
    try_terms(session, student, teacher)
    format_of(student, session.recipe.release.format)  # refused before it is trained
    try_forms(session, student)
    save_model(session, student, session.folder.student)


@torch.no_grad()
def try_terms(session: Session, student: Any, teacher: Any) -> None:
    """Compute the loss once: heads or widths that cannot be compared are refused here. Raises InputError."""
    corpus, recipe = session.corpus, session.recipe
    main, encoder = maps_of(StudentPlan.load(session.folder.plan))
    objective = Objective(recipe.losses, corpus.head, main, session.vocabulary, encoder_maps=encoder)
    objective.project(student.config.hidden_size, teacher.config.hidden_size)
    for each in (student, teacher) if objective.student.attention else ():
        use_eager_attention(each)
    batch = session.first_examples(TRIED)
    if "token_type_ids" in batch and takes_token_types(teacher) and not takes_token_types(student):
        session.say(
            f"  a {student.config.model_type} knows no token types: of a pair it is not told which text is which"
        )
    if objective.needs_teacher:
        own, taught = forward(student, batch, objective.student), forward(teacher, batch, objective.teacher)
        objective(own, taught, batch, objective.counts([batch]))


def given_inputs(session: Session) -> dict[str, Any]:
    """List what the plan and the copy of a given student are made from."""
    return {
        "teacher": folder_fingerprint(session.teacher),
        "student": folder_fingerprint(session.folder_of(KEY)),  # its plan.json included
        "losses": [term.model_dump(mode="json") for term in session.recipe.losses],
        "data": session.corpus.fingerprint,
        "seed": session.recipe.seed,
    }

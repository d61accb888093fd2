"""Stage `draw`: make the models that controls start from and that the seed decides: another cut, random weights."""

from __future__ import annotations

from typing import Any

from distill.evaluation.arms import drawn_arms
from distill.files import content_of, write_text
from distill.models.load import folder_fingerprint
from distill.models.plan import StudentPlan
from distill.pipeline import repair
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage
from distill.pipeline.train import save_model
from distill.student import build_student
from distill.student.draw import draw_plan, draw_weights


def work(session: Session) -> None:
    """Draw a start for each arm that has one of its own."""
    for arm in drawn_arms(session.recipe):
        if arm == "random_cut":
            cut_at_random(session)
        else:
            student = session.load(session.folder.student)
            save_model(session, draw_weights(student, session.recipe.seed), session.folder.start(arm))


def cut_at_random(session: Session) -> None:
    """Cut a student of the same sizes from the teacher, with other layers and neurons; repaired where ours is."""
    recipe, path = session.recipe, session.arm_plan("random_cut")
    teacher, plan = session.load(session.teacher), StudentPlan.load(session.folder.plan)
    drawn = draw_plan(teacher, plan, recipe.student, recipe.seed)
    write_text(path, drawn.to_json())
    session.say(f"  random_cut: layers {', '.join(map(str, drawn.kept_layers))}; ours are {plan.kept_layers}")
    start = session.folder.start("random_cut")
    save_model(session, build_student(teacher, drawn), start)
    if recipe.student.repair.wanted:
        repaired, _ = repair.repair(session, start, drawn)
        save_model(session, repaired, start)


def inputs(session: Session) -> dict[str, Any]:
    """List the student, the seed, and for another cut the teacher and all that a cut depends on."""
    run, recipe, arms = session.folder, session.recipe, drawn_arms(session.recipe)
    own = {"arms": arms, "seed": recipe.seed, "student": folder_fingerprint(run.student)}
    if "random_cut" in arms:
        keys = {"layers", "encoder_layers"}
        own |= {"plan": content_of(run.plan), "layers": recipe.student.model_dump(mode="json", include=keys)}
        own |= {"teacher": folder_fingerprint(session.teacher)}
        own |= {"repair": repair.inputs(session)} if recipe.student.repair.wanted else {}
    return own


def results(session: Session) -> list[Any]:
    """List the starts, and the plan of a random cut."""
    arms = drawn_arms(session.recipe)
    plans = [session.arm_plan(arm) for arm in arms if arm == "random_cut"]
    return [*(session.folder.start(arm) for arm in arms), *plans]


STAGE = Stage("draw", work, inputs, results, wanted=lambda recipe: bool(drawn_arms(recipe)))

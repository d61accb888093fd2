"""Stage `draw`: make the models that controls start from and that the seed decides: another cut, random weights."""

from __future__ import annotations

from pathlib import Path
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
    recipe, folder = session.recipe, session.folder
    for arm in drawn_arms(recipe):
        if arm == "random_cut":
            cut_at_random(session, folder.start(arm))
        else:
            save_model(session, draw_weights(session.load(folder.student), recipe.seed), folder.start(arm))


def cut_at_random(session: Session, start: Path) -> None:
    """Cut a student of the same sizes from the teacher, with other layers and neurons; repaired where ours is."""
    spec, teacher, ours = session.recipe.student, session.load(session.teacher), StudentPlan.load(session.folder.plan)
    drawn = draw_plan(teacher, ours, spec, session.recipe.seed)
    write_text(session.arm_plan("random_cut"), drawn.to_json())
    session.say(f"  random_cut: layers {drawn.kept_layers}, where the student has {ours.kept_layers}")
    save_model(session, build_student(teacher, drawn), start)
    if spec.repair.wanted:
        save_model(session, repair.repair(session, start, drawn)[0], start)


def inputs(session: Session) -> dict[str, Any]:
    """List the student, the seed, and for another cut the teacher and all that a cut depends on."""
    run, spec, arms = session.folder, session.recipe.student, drawn_arms(session.recipe)
    own = {"arms": arms, "seed": session.recipe.seed, "student": folder_fingerprint(run.student)}
    if "random_cut" in arms:
        layers = spec.model_dump(mode="json", include={"layers", "encoder_layers"})
        own |= {"plan": content_of(run.plan), "layers": layers, "teacher": folder_fingerprint(session.teacher)}
        own |= {"repair": repair.inputs(session)} if spec.repair.wanted else {}
    return own


def results(session: Session) -> list[Path]:
    """List the starts, and the plan of a random cut."""
    arms = drawn_arms(session.recipe)
    return [*map(session.folder.start, arms), *(session.arm_plan(arm) for arm in arms if arm == "random_cut")]


STAGE = Stage("draw", work, inputs, results, wanted=lambda recipe: bool(drawn_arms(recipe)))

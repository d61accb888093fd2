"""Stage `seeds`: repeat with other seeds all that is random after the teacher, each in a run folder inside this one."""

from __future__ import annotations

from typing import Any

from distill.pipeline import control, draw, evaluate, train
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage, run_inside

TRAININGS = (draw.STAGE, train.STAGE, control.STAGE)


def work(session: Session) -> None:
    """Draw, train and measure with each other seed; what a killed command has finished is skipped."""
    for child in session.children:
        run_inside(child, (*TRAININGS, evaluate.STAGE))


def inputs(session: Session) -> dict[str, Any]:
    """List the seeds, and what the same stages of this run are made of."""
    wanted = [stage for stage in TRAININGS if stage.wanted(session.recipe)]
    own = {stage.name: stage.inputs(session) for stage in wanted}
    seeds = [child.recipe.seed for child in session.children]
    return {"seeds": seeds, **own, "evaluate": evaluate.own_inputs(session)}


STAGE = Stage(
    "seeds",
    work,
    inputs,
    lambda session: [child.folder.evaluation for child in session.children],
    wanted=lambda recipe: recipe.evaluation.seeds > 1,
    together=True,
)

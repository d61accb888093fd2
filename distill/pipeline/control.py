"""Stage `control`: train every arm that the student has to beat, with settings of its own where the recipe has them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from distill.evaluation.arms import controls, searches, tries_of
from distill.evaluation.metrics import higher_is_better
from distill.files import read_written, write_json
from distill.pipeline.json_shapes import Search
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage
from distill.pipeline.train import arm_inputs, save_model, spec_of, train_arm
from distill.ranks import process_state
from distill.training import read_records
from distill.training.loop import METRICS

SEARCH = "search.json"
"""In the folder of a control: the settings that were tried, and what they were chosen by."""


def work(session: Session) -> None:
    """Train every control arm, and save it."""
    for arm in controls(session.recipe):
        tries = tries_of(session.recipe, arm)
        if len(tries) > 1:
            search(session, arm, tries)
        else:
            save_model(session, train_arm(session, arm, tries[0], session.train_folder(arm)), session.arm_folder(arm))


def search(session: Session, arm: str, tries: Sequence[Mapping[str, Any]]) -> None:
    """Train an arm with each of its settings, and save the one that is best on the validation split.

    Each is measured at the end of its training, as every training is. What a killed run has trained is read from its
    checkpoints.
    """
    main, folder, outcomes = process_state().is_main_process, session.train_folder(arm), list[dict[str, Any]]()
    for own in tries:
        place = folder / "tries" / ",".join(f"{key}={value}" for key, value in own.items())
        model = train_arm(session, arm, own, place)
        outcomes += broadcast_object_list([{**own, **_outcome(place)} if main else None])
        by, best = best_of(outcomes, session.recipe.evaluation.metrics or ())
        if best == len(outcomes) - 1:
            save_model(session, model, session.arm_folder(arm))
            if main:
                shutil.copyfile(place / METRICS, folder / METRICS)
    if main:
        write_json(folder / SEARCH, {"by": by, "split": "validation", "tried": outcomes, "chosen": best})
    session.say(f"  {arm}: best {by} on validation with {tries[best]}, of {len(tries)} settings")


def _outcome(folder: Path) -> dict[str, Any]:
    records = read_records(folder / METRICS)
    measured = [record["metrics"] for record in records if record["event"] == "evaluate"]
    return {"metrics": measured[-1], "tokens": _tokens(records)}


def _tokens(records: Sequence[Mapping[str, Any]]) -> int | None:
    """Find how many tokens a training saw, padding not counted; None where nothing was recorded."""
    return next((record.get("tokens") for record in reversed(records) if record.get("event") == "train"), None)


def best_of(outcomes: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> tuple[str, int]:
    """Find the best of several settings, the first of equal ones; one whose value is not finite is the worst.

    They are judged by the first metric that is wanted, of those that trainings measure, else by the first of these.
    """
    metric: str = next(name for name in (*wanted, *outcomes[0]["metrics"]) if name in outcomes[0]["metrics"])
    sign, values = 1 if higher_is_better(metric) else -1, [own["metrics"][metric] for own in outcomes]
    scores = [-math.inf if value is None else sign * value for value in values]
    return metric, scores.index(max(scores))


def budget_of(session: Session, arm: str) -> dict[str, Any]:
    """Say how long and how fast a trained arm learned, and how its settings were chosen where several were tried."""
    folder, tries = session.train_folder(arm), tries_of(session.recipe, arm)
    found = read_written(folder / SEARCH, Search) if len(tries) > 1 else None
    spec = spec_of(session, arm, tries[found["chosen"] if found else 0])
    return {"steps": spec.steps, "lr": spec.lr, "tokens": _tokens(read_records(folder / METRICS)), "search": found}


def inputs(session: Session) -> dict[str, Any]:
    """List what every control is made of, and what the best of several settings is chosen by."""
    recipe = session.recipe
    chosen_by = {"chosen_by": recipe.evaluation.metrics} if searches(recipe) else {}
    return chosen_by | {arm: arm_inputs(session, arm, tries_of(recipe, arm)) for arm in controls(recipe)}


def results_of(session: Session, arm: str) -> list[Path]:
    """List the model of a control, and where several settings were tried what they gave."""
    several = len(tries_of(session.recipe, arm)) > 1
    return [session.arm_folder(arm), *([session.folder.control(arm) / SEARCH] if several else [])]


STAGE = Stage(
    "control",
    work,
    inputs,
    lambda session: [path for arm in controls(session.recipe) for path in results_of(session, arm)],
    wanted=lambda recipe: bool(controls(recipe)),
    together=True,
)

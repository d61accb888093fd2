"""The only package that knows a whole recipe: one file per stage, in the order of the work."""

from distill.pipeline import (
    build,
    cache,
    calibrate,
    data,
    evaluate,
    examine,
    plan,
    release,
    repair,
    seeds,
    teacher,
    train,
)
from distill.pipeline.folder import RunDir
from distill.pipeline.session import Session
from distill.pipeline.stage import local_inputs, run_stages

STORY = (
    data.STAGE,
    teacher.STAGE,
    calibrate.STAGE,
    plan.STAGE,
    build.STAGE,
    repair.STAGE,
    examine.STAGE,  # here, as to plan and to build cost little, and to train much
    *seeds.TRAININGS,  # draw, cache, train, control
    seeds.STAGE,
    evaluate.STAGE,
    release.STAGE,
)
VERBS = {
    verb: STORY[: STORY.index(last) + 1]
    for verb, last in {
        "plan": plan.STAGE,
        "build": repair.STAGE,
        "cache": cache.STAGE,
        "train": train.STAGE,
        "evaluate": evaluate.STAGE,
        "release": release.STAGE,
        "run": release.STAGE,
    }.items()
}
"""Stages that each verb brings up to date; those that are unchanged are skipped."""

__all__ = ["STORY", "VERBS", "RunDir", "Session", "local_inputs", "run_stages"]

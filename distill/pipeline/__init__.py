"""The only package that knows a whole recipe: one file per stage, in the order of the work."""

from distill.pipeline import build, calibrate, data, evaluate, plan, release, repair, teacher, train
from distill.pipeline.folder import RunDir
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage, check_stages, local_inputs, run_stages

STORY = (
    data.STAGE,
    teacher.STAGE,
    calibrate.STAGE,
    plan.STAGE,
    build.STAGE,
    repair.STAGE,
    train.STAGE,
    train.CONTROL,
    evaluate.STAGE,
    release.STAGE,
)
_LAST = {
    "plan": "plan",
    "build": "repair",
    "train": "train",
    "evaluate": "evaluate",
    "release": "release",
    "run": "release",
}
_NAMES = [stage.name for stage in STORY]
VERBS: dict[str, tuple[Stage, ...]] = {verb: STORY[: _NAMES.index(last) + 1] for verb, last in _LAST.items()}
"""Each verb brings everything before it up to date; what is unchanged is skipped."""

__all__ = ["STORY", "VERBS", "RunDir", "Session", "Stage", "check_stages", "local_inputs", "run_stages"]

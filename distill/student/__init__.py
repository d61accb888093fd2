"""Building a student: calibrate the teacher once, score, plan, cut.

A score of one's own is a function `(layer: MlpLayer, statistics: Statistics | None, *, ...) -> Tensor [F]`; name it in
the recipe as `score: package.module:function`. Its keyword-only parameters are what `params` may contain.
"""

from distill.student.build import build_student
from distill.student.calibration.collect import calibrate
from distill.student.calibration.statistics import Statistics
from distill.student.layers import LAYER_POLICIES
from distill.student.plan import check_student, plan_student
from distill.student.scores import MlpLayer

__all__ = [
    "LAYER_POLICIES",
    "MlpLayer",
    "Statistics",
    "build_student",
    "calibrate",
    "check_student",
    "plan_student",
]

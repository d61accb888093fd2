"""The plan of a student that is given: nothing was cut, so its layers are paired with the teacher's by rule."""

from __future__ import annotations

from typing import Any

from distill.models.family import depths_of
from distill.models.layout import StackName
from distill.models.mlp import mlps_of
from distill.models.plan import GivenStudent, KeptUnits, LayerPlan, StudentPlan, even_pairs

GIVEN = "given"
"""Stands in a plan where the name of a policy, a score or an allocation would."""


def describe_student(teacher: Any, student: Any, before: StudentPlan | None = None) -> StudentPlan:
    """Describe a student of any family beside its teacher.

    Args:
        teacher: A transformers model of a known family; needs no weights.
        student: The same; with as many stacks.
        before: The plan that an earlier run released with it. Where it was made for a teacher of this family and depth,
            it says which of the teacher's layers each of the student's comes from.
    """
    depths = depths_of(teacher)
    mlps = {side: mlps_of(student, side) for side in depths}
    composed = None
    if before is not None and before.is_for(teacher.config.model_type, depths):
        composed = before if all(len(before.stack(side)) == len(own) for side, own in mlps.items()) else None

    def stack(side: StackName) -> list[LayerPlan]:
        ends = [end for _, end in even_pairs(len(mlps[side]), depths[side])]
        if composed is not None:
            ends = [layer.teacher_layer for layer in composed.stack(side)]
        pairs = zip(ends, mlps[side], strict=True)
        return [LayerPlan(teacher_layer=end, kept={"mlp": KeptUnits(of=mlp.width)}) for end, mlp in pairs]

    return StudentPlan(
        model_type=teacher.config.model_type,
        teacher_layers=depths["main"],
        layers=stack("main"),
        teacher_encoder_layers=depths.get("encoder"),
        encoder_layers=stack("encoder") if "encoder" in depths else None,
        layer_policy=GIVEN,
        mlp_score=GIVEN,
        mlp_allocation=GIVEN,
        given=GivenStudent(
            model_type=student.config.model_type,
            hidden_size=student.config.hidden_size,
            teacher_hidden_size=teacher.config.hidden_size,
            map="rule" if composed is None else "plan",
        ),
    )

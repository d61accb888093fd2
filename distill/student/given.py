"""The plan of a student that is given: nothing was cut, so its layers are paired with the teacher's by rule."""

from __future__ import annotations

from typing import Any

from distill.models.family import layers_of, layout_of
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
    sides = layout_of(teacher).sides
    depths = {side: len(layers_of(teacher, side)) for side in sides}
    own = {side: len(layers_of(student, side)) for side in sides}
    composed = before is not None and _is_of(before, teacher.config.model_type, depths, own)

    def stack(side: StackName) -> list[LayerPlan]:
        widths = {index: mlp.width for index, mlp in enumerate(mlps_of(student, side))}
        pairs = even_pairs(own[side], depths[side])
        if before is not None and composed:
            pairs = [(index, layer.teacher_layer) for index, layer in enumerate(before.stack(side))]
        return [LayerPlan(teacher_layer=to, kept={"mlp": KeptUnits(of=widths[index])}) for index, to in pairs]

    return StudentPlan(
        model_type=teacher.config.model_type,
        teacher_layers=depths["main"],
        layers=stack("main"),
        teacher_encoder_layers=depths.get("encoder"),
        encoder_layers=stack("encoder") if "encoder" in sides else None,
        layer_policy=GIVEN,
        mlp_score=GIVEN,
        mlp_allocation=GIVEN,
        given=GivenStudent(
            model_type=student.config.model_type,
            hidden_size=student.config.hidden_size,
            teacher_hidden_size=teacher.config.hidden_size,
            map="plan" if composed else "rule",
        ),
    )


def _is_of(plan: StudentPlan, family: str, depths: dict[StackName, int], own: dict[StackName, int]) -> bool:
    """Tell whether a plan pairs layers of such a student with those of such a teacher."""
    planned = {"main": plan.teacher_layers, "encoder": plan.teacher_encoder_layers}
    fits = all(planned[side] == depths[side] and len(plan.stack(side)) == own[side] for side in depths)
    return plan.model_type == family and fits

"""Pairs of student and teacher layers that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distill.errors import InputError
from distill.models.layout import StackName
from distill.models.plan import StudentPlan, even_pairs

Policy = Literal["plan", "span", "even", "last"] | Sequence[tuple[int, int]]
"""A policy by name, or explicit (student layer, teacher layer) pairs."""


@dataclass(frozen=True)
class LayerMap:
    """Pairs of layers whose outputs a hidden loss compares."""

    pairs: tuple[tuple[int, int], ...]
    """(student layer, teacher layer), each counted from 0 in its own model."""


def layer_map(
    policy: Policy, plan: StudentPlan | None, student_layers: int, teacher_layers: int, side: StackName = "main"
) -> LayerMap:
    """Resolve a policy into pairs that exist in both models.

    Only `plan` knows what was cut: after layers are dropped, pairing equal indices compares the wrong layers.

    Args:
        policy: `plan` pairs each kept layer with the teacher layer it came from; `span` pairs it with the last layer
            before the next kept one, so that the student layer before a cut does the work of the dropped layers, too;
            `even` divides the teacher into as many equal spans and pairs their ends; `last` pairs the two last layers.
            Of a given student that was not cut from this teacher, `plan` and `span` mean `even`.
        plan: how the student was cut; only `plan` and `span` need it.
        student_layers: number of layers of the student.
        teacher_layers: number of layers of the teacher.
        side: the stack of the plan that they are of.

    Raises:
        InputError: no plan for `plan` or `span`, or a pair that names a layer which does not exist.
    """
    if plan is not None and plan.given is not None and plan.given.map == "rule" and policy in ("plan", "span"):
        policy = "even"
    if not isinstance(policy, str):
        pairs = [(student, teacher) for student, teacher in policy]
    elif policy == "last":
        pairs = [(student_layers - 1, teacher_layers - 1)]
    elif policy == "even":
        pairs = even_pairs(student_layers, teacher_layers)
    elif plan is None:
        raise InputError(f"map: {policy} needs the plan of the student; write `map: last` or a list of pairs")
    else:
        kept = [layer.teacher_layer for layer in plan.stack(side)]
        ends = kept if policy == "plan" else [end - 1 for end in (*kept[1:], teacher_layers)]
        pairs = list(enumerate(ends))
    for pair in pairs:  # the recipe's rules do not know the depth of a teacher on the hub
        for model, layer, layers in zip(("student", "teacher"), pair, (student_layers, teacher_layers), strict=True):
            if not 0 <= layer < layers:
                raise InputError(
                    f"map: pair {list(pair)} names {model} layer {layer}, but the {model} has {layers} layers; "
                    f"use 0 to {layers - 1} (pairs are [student, teacher])"
                )
    return LayerMap(tuple(pairs))

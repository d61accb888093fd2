"""Which student layer is compared with which teacher layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distill.errors import InputError
from distill.models.plan import StudentPlan

Policy = Literal["plan", "span", "even", "last"] | Sequence[tuple[int, int]]
"""A policy by name, or explicit (student layer, teacher layer) pairs."""


@dataclass(frozen=True)
class LayerMap:
    """Pairs of layers whose outputs a hidden loss compares."""

    pairs: tuple[tuple[int, int], ...]
    """(student layer, teacher layer), each counted from 0 in its own model."""


def layer_map(policy: Policy, plan: StudentPlan | None, student_layers: int, teacher_layers: int) -> LayerMap:
    """Resolve a policy into pairs that exist in both models.

    Only `plan` knows what was cut: after layers are dropped, pairing equal indices compares the wrong layers.

    Args:
        policy: `plan` pairs each kept layer with the teacher layer it came from; `span` pairs it with the last layer
            before the next kept one, so that the student layer before a cut does the work of the dropped layers, too;
            `even` divides the teacher into as many equal spans and pairs their ends; `last` pairs the two last layers.
        plan: how the student was cut; only `plan` and `span` need it.
        student_layers: number of layers of the student.
        teacher_layers: number of layers of the teacher.

    Raises:
        InputError: no plan for `plan`, an unknown policy, no pair at all, a pair twice, or a layer that does not exist.
    """
    if policy in ("plan", "span"):
        if plan is None:
            raise InputError(f"map: {policy} needs the plan of the student; write `map: last` or a list of pairs")
        pairs = plan.layer_map if policy == "plan" else _span_ends(plan.kept_layers, teacher_layers)
    elif policy == "even":
        ends = [(layer + 1) * teacher_layers // student_layers - 1 for layer in range(student_layers)]
        pairs = [(layer, max(0, end)) for layer, end in enumerate(ends)]
    elif policy == "last":
        pairs = [(student_layers - 1, teacher_layers - 1)]
    elif isinstance(policy, str):
        raise InputError(
            f"map: unknown policy {policy!r}; write plan, span, even, last or a list of [student, teacher] pairs"
        )
    else:
        pairs = [(student, teacher) for student, teacher in policy]
    _check_pairs(pairs, student_layers, teacher_layers)
    return LayerMap(tuple(pairs))


def _span_ends(kept: Sequence[int], teacher_layers: int) -> list[tuple[int, int]]:
    return [(layer, end - 1) for layer, end in enumerate([*kept[1:], teacher_layers])]


def _check_pairs(pairs: list[tuple[int, int]], student_layers: int, teacher_layers: int) -> None:
    if not pairs:
        # An empty map would be a loss of 0 that nobody notices.
        raise InputError("map: no layer is mapped; give [student, teacher] pairs, or remove the hidden term")
    for pair in pairs:
        for side, layer, layers in zip(("student", "teacher"), pair, (student_layers, teacher_layers), strict=True):
            if not 0 <= layer < layers:
                raise InputError(
                    f"map: pair {list(pair)} names {side} layer {layer}, but the {side} has {layers} layers; "
                    f"use 0 to {layers - 1} (pairs are [student, teacher])"
                )
        if pairs.count(pair) > 1:
            raise InputError(f"map: pair {list(pair)} is listed twice; remove one (`weight` makes a term count more)")

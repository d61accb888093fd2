from dataclasses import FrozenInstanceError

import pytest

from distill.errors import InputError
from distill.losses import LayerMap, layer_map
from distill.models.plan import KeptUnits, LayerPlan, StudentPlan

KEPT = [0, 2, 5]
PLAN = StudentPlan(
    model_type="bert",
    teacher_layers=6,
    layers=[LayerPlan(teacher_layer=layer, kept={"mlp": KeptUnits(of=128)}) for layer in KEPT],
    layer_policy="explicit",
    mlp_score="activation",
    mlp_allocation="uniform",
)


@pytest.mark.parametrize(
    ("policy", "pairs"),
    [
        ("plan", ((0, 0), (1, 2), (2, 5))),
        ("span", ((0, 1), (1, 4), (2, 5))),  # the ends of what was dropped after each kept layer
        ("even", ((0, 1), (1, 3), (2, 5))),
        ("last", ((2, 5),)),
        ([(0, 1), (2, 3)], ((0, 1), (2, 3))),
        ([(1, 2), (1, 4)], ((1, 2), (1, 4))),  # one student layer may follow two teacher layers
    ],
)
def test_a_policy_becomes_pairs_of_student_and_teacher_layers(policy, pairs):
    assert layer_map(policy, PLAN, 3, 6) == LayerMap(pairs)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ([(3, 0)], r"pair \[3, 0\] names student layer 3, but the student has 3 layers; use 0 to 2"),
        ([(0, 6)], "teacher layer 6, but the teacher has 6 layers; use 0 to 5"),
        ([(-1, 5)], "student layer -1"),
    ],
)
def test_a_map_that_cannot_be_meant_is_refused_with_the_fix(policy, message):
    with pytest.raises(InputError, match=message):
        layer_map(policy, PLAN, 3, 6)


def test_a_plan_for_another_student_is_refused():
    with pytest.raises(InputError, match="student layer 2, but the student has 2 layers"):
        layer_map("plan", PLAN, 2, 6)


def test_only_the_plan_policy_needs_a_plan():
    assert layer_map("last", None, 3, 6).pairs == ((2, 5),)
    with pytest.raises(InputError, match="needs the plan of the student"):
        layer_map("plan", None, 3, 6)


def test_a_map_does_not_change():
    with pytest.raises(FrozenInstanceError):
        layer_map("last", PLAN, 3, 6).pairs = ()

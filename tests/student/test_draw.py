"""Students that nobody chose have the sizes of the planned one, in every form of layer."""

from __future__ import annotations

import pytest
import torch
from tiny import FORMS, cut_by_hand, tiny_inputs, tiny_model

from distill.errors import InputError
from distill.models.family import layout_of
from distill.recipe.schema import Student
from distill.student import build_student, plan_student
from distill.student.draw import draw_plan, draw_weights

SPEC = {"layers": {"keep": 2, "choose": "last"}, "mlp": {"keep": 0.5, "score": "magnitude", "multiple_of": 8}}


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def planned(teacher, **changes):
    both = {"encoder_layers": {"keep": 3, "choose": "last"}} if "encoder" in layout_of(teacher).sides else {}
    spec = Student.model_validate({**SPEC, **both, **changes})
    return spec, plan_student(teacher, spec)


@pytest.mark.parametrize("family", FORMS)
def test_a_random_cut_has_the_sizes_of_the_plan_and_other_layers_or_neurons_of_each_stack(family):
    teacher = tiny_model(family)
    spec, plan = planned(teacher)
    drawn = [draw_plan(teacher, plan, spec, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    students = [build_student(teacher, own) for own in (plan, drawn[0])]
    assert shapes(students[0]) == shapes(students[1])
    for side in layout_of(teacher).sides:
        assert [layer.width for layer in drawn[0].stack(side)] == [layer.width for layer in plan.stack(side)]
        assert drawn[0].stack(side) != plan.stack(side)


def test_protected_layers_stay_in_a_random_cut_and_kept_stacks_stay_whole():
    teacher = tiny_model("llama")
    layers = {"keep": 2, "choose": "random", "protect_first": 1}
    spec, plan = planned(teacher, layers=layers)
    kept = {tuple(draw_plan(teacher, plan, spec, seed).kept_layers) for seed in range(12)}
    assert len(kept) > 1 and all(each[0] == 0 for each in kept)
    teacher = tiny_model("t5")
    spec = Student.model_validate(SPEC)
    plan = plan_student(teacher, spec)
    assert [layer.teacher_layer for layer in draw_plan(teacher, plan, spec, 3).stack("encoder")] == [0, 1, 2, 3]


def test_layers_that_depend_on_their_index_stay_those_of_the_plan():
    teacher = tiny_model("bert")
    teacher.config.scale_attn_by_inverse_layer_idx = True
    spec, plan = planned(teacher, layers={"keep": 2, "choose": "first"})
    drawn = draw_plan(teacher, plan, spec, 0)
    assert drawn.kept_layers == plan.kept_layers == [0, 1] and drawn.layers != plan.layers


def test_a_student_that_keeps_everything_has_no_other_cut():
    teacher = tiny_model("bert")
    spec, plan = planned(teacher, layers={"keep": 4}, mlp={"keep": 1.0, "score": "magnitude"})
    with pytest.raises(InputError, match="random_cut: no student with other layers or neurons has the sizes"):
        draw_plan(teacher, plan, spec, 0)


def assert_drawn(fresh, student):
    """Weights of the same shapes, none of them the student's, and a model that runs."""
    own, theirs = fresh.state_dict(), student.state_dict()
    assert shapes(fresh) == shapes(student) and fresh.config.to_dict() == student.config.to_dict()
    matrices = [name for name, tensor in own.items() if tensor.ndim > 1]
    assert matrices
    for name in matrices:
        assert not (own[name] == theirs[name]).logical_and(own[name] != 0).any(), name
    assert torch.isfinite(fresh(**tiny_inputs(fresh))[0]).all()


@pytest.mark.parametrize("family", FORMS)
def test_random_weights_are_none_of_the_students_and_follow_from_the_seed(family):
    teacher = tiny_model(family)
    student = build_student(teacher, planned(teacher)[1])
    fresh = draw_weights(student, 1)
    assert_drawn(fresh, student)
    again, other = draw_weights(student, 1).state_dict(), draw_weights(student, 2).state_dict()
    same = [name for name, tensor in fresh.state_dict().items() if torch.equal(tensor, other[name])]
    assert all(torch.equal(tensor, again[name]) for name, tensor in fresh.state_dict().items())
    assert not any(fresh.state_dict()[name].any() and fresh.state_dict()[name].ndim > 1 for name in same)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_random_weights_have_the_widths_of_each_layer(family):
    student = cut_by_hand(tiny_model(family), [0, 2], [16, 24])
    assert_drawn(draw_weights(student, 0), student)

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_inputs, tiny_model

from distill.errors import InputError
from distill.evaluation.efficiency import count_flops
from distill.models.cost import flops_by_module, random_example
from distill.models.family import layers_of, layout_of
from distill.recipe.schema import Mlp, Student, Target
from distill.student import build_student, calibrate, check_student, plan_student
from distill.student.targets import costs_of, shares, solve


def spec(target, keep=2, **mlp):
    mlp = {"score": "random", "multiple_of": 8, **mlp}
    return Student.model_validate({"layers": {"keep": keep}, "mlp": mlp, "target": target})


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_costs_are_those_of_the_built_student(form):
    teacher = tiny_model(form)
    own = {"layers": {"keep": [0, 2]}, "mlp": {"keep": 16, "score": "random", "multiple_of": 8}}
    plan = plan_student(teacher, Student.model_validate(own))
    student = build_student(teacher, plan)
    places = [(side, layer.teacher_layer) for side in layout_of(teacher).sides for layer in plan.stack(side)]
    widths = [layer.width for side in layout_of(teacher).sides for layer in plan.stack(side)]
    assert costs_of(teacher, Target(parameters=0.5)).of(places, widths) == parameters(student)
    counted, _ = flops_by_module(student, random_example(student, 12))
    assert costs_of(teacher, Target(flops=0.5, length=12)).of(places, widths) == pytest.approx(counted[student])


@pytest.mark.parametrize("allocate", ["uniform", "global", "sensitivity"])
@pytest.mark.parametrize("kind", ["parameters", "flops"])
def test_the_student_is_the_largest_within_the_target(kind, allocate):
    teacher = tiny_model("llama", vocab_size=8)
    statistics = calibrate(teacher, [{k: v % 8 if k == "input_ids" else v for k, v in tiny_inputs(teacher).items()}])
    asked = 0.42
    plan = plan_student(teacher, spec({kind: asked}, allocate=allocate, score="activation"), statistics)
    student = build_student(teacher, plan)

    def cost(model):
        return (
            parameters(model) if kind == "parameters" else flops_by_module(model, random_example(model, 64))[0][model]
        )

    share = cost(student) / cost(teacher)
    multiple = 8 * (2 if allocate == "uniform" else 1)  # uniform widens both layers at once
    next_share = share + multiple * 3 * 32 * (1 if kind == "parameters" else 2 * 64) / cost(teacher)
    assert share <= asked < next_share
    choice = plan.outcomes[f"student.target.{kind}"]
    assert "(0.4200 of the teacher's)" in choice.asked and f"({share:.4f} of the teacher's)" in choice.got
    assert "(from student.target)" in plan.outcomes["student.mlp.keep"].asked


def test_a_count_of_parameters_is_a_target_too():
    teacher = tiny_model("bert")
    own = {"layers": {"keep": 2}, "mlp": {"keep": 24, "score": "random", "multiple_of": 8}}
    half = build_student(teacher, plan_student(teacher, Student.model_validate(own)))
    plan = plan_student(teacher, spec({"parameters": parameters(half)}))
    assert plan.widths == [24, 24] and plan.outcomes["student.target.parameters"].reason == ""


@pytest.mark.parametrize("target", [{"parameters": 0.05}, {"parameters": 0.99}, {"parameters": 10}, {"flops": 0.9}])
def test_a_target_out_of_reach_is_refused_with_what_can_be_reached(target):
    teacher = tiny_model("bert")
    for refuse in (check_student, plan_student):
        with pytest.raises(InputError, match=r"cannot be reached with these layers; their MLPs alone give .* to "):
            refuse(teacher, spec(target))


def test_what_is_reachable_passes_the_first_check():
    for target in ({"parameters": 0.5}, {"latency": 0.01}, None):
        check_student(tiny_model("bert"), spec(target))
    check_student(tiny_model("bart"), spec({"parameters": 0.6}, keep=2))


def test_latency_is_measured_and_reported():
    teacher = tiny_model("llama", intermediate_size=4096)  # most of the time goes into the MLPs
    own = {"keep": [0, 1, 2, 3], "multiple_of": 512}
    plan = plan_student(teacher, spec({"latency": 0.6, "length": 64}, **own))
    assert 512 <= plan.widths[0] < 4096
    assert float(plan.outcomes["student.target.latency"].got.split()[0]) <= 0.6
    with pytest.raises(InputError, match=r"student\.target\.latency: 0\.0010 of the teacher's cannot be reached"):
        plan_student(teacher, spec({"latency": 0.001, "length": 64}, **own))


def test_nothing_is_left_to_solve_with_when_all_is_protected():
    with pytest.raises(InputError, match="every kept layer is protected"):
        plan_student(tiny_model("bert"), spec({"parameters": 0.9}, keep=[1, 2], protect=[1, 2]))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from([1, 4, 16, 64]), st.booleans())
def test_shares_lead_to_widths_that_can_be_had(sizes, multiple, shared):
    from distill.student.allocate import layer_widths

    full = [16 * size for size in sizes]
    mlp = Mlp(multiple_of=multiple, allocate="global" if shared else "uniform", score="random")
    steps = shares(mlp, full)
    assert steps == sorted(set(steps)) and steps[-1] == 1.0
    scores = [torch.rand(size) for size in full]
    totals = [sum(layer_widths(scores, mlp, step, None, [False] * len(full))) for step in steps]
    assert totals == sorted(totals) and totals[-1] == sum(full)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30, unique=True), st.integers(1, 100))
def test_bisection_finds_the_largest_cost_within_the_target(costs, asked):
    costs, steps = sorted(costs), [(i + 1) / len(costs) for i in range(len(costs))]
    target, looked = Target(parameters=asked), []

    def cost(share):
        looked.append(share)
        return costs[steps.index(share)]

    if not costs[0] <= asked <= costs[-1]:
        with pytest.raises(InputError, match="cannot be reached"):
            solve(target, 100.0, steps, cost)
        return
    share, choice = solve(target, 100.0, steps, cost)
    got = costs[steps.index(share)]
    assert got == max(own for own in costs if own <= asked)
    assert choice.got.startswith(f"{got} parameters") and len(looked) <= 2 + len(costs).bit_length()


def test_the_work_of_experts_is_counted():
    model = tiny_model("mixtral")
    counts, _ = flops_by_module(model, random_example(model, 12))
    experts = layers_of(model)[0].get_submodule("mlp.experts")
    assert counts[experts] == 12 * 2 * (2 * 3 * 32 * 48)  # 12 tokens, 2 experts each, 3 matrices of 32 x 48


def test_the_efficiency_table_counts_flops_the_same_way():
    model = tiny_model("llama")
    inputs = random_example(model, 12)
    counts, _ = flops_by_module(model, inputs)
    assert count_flops(model, layers_of, {"input_ids": inputs["input_ids"]})["flops_per_example"] == counts[model]

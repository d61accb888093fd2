"""Plans with widths of their own for each layer, for both stacks and for experts, and what they report."""

from __future__ import annotations

import pytest
import torch
from tiny import LAYERS, WIDTH, tiny_inputs, tiny_model

from distill.errors import InputError
from distill.models.family import layout_of
from distill.models.mlp import mlps_of
from distill.recipe.schema import Student
from distill.student import build_student, calibrate, check_student, plan_student
from distill.student.calibration.collect import StatisticsRequest
from distill.student.plan import wanted_statistics


def spec(keep=1.0, layers=None, encoder=None, **mlp):
    own = {"layers": layers or {"keep": LAYERS}, "mlp": {"keep": keep, "multiple_of": 8, **mlp}}
    return Student.model_validate(own | ({"encoder_layers": encoder} if encoder else {}))


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def depth(model, side="main"):
    return len(mlps_of(model, side))


def test_a_threshold_takes_out_what_is_dead_and_nothing_else(form):
    teacher = tiny_model(form)
    batch, alive = tiny_inputs(teacher, padded=False), {}
    with torch.no_grad():
        for side in layout_of(teacher).sides:
            for index, mlp in enumerate(mlps_of(teacher, side)):
                alive[side, index] = WIDTH - 8 * index - (4 if side == "encoder" else 0)
                mlp.weight_out[..., alive[side, index] :] = 0
    rule = {"allocate": "threshold", "allocate_params": {"threshold": 1e-9}, "multiple_of": 1, "score": "output_norm"}
    plan = plan_student(teacher, spec(layers={"keep": depth(teacher)}, **rule), calibrate(teacher, [batch]))
    for side in layout_of(teacher).sides:
        for index, layer in enumerate(plan.stack(side)):
            # The ReLU of two families leaves other neurons at zero on the whole sample, too.
            assert layer.width == alive[side, index] or (form in ("opt", "t5") and layer.width < alive[side, index])
    student = build_student(teacher, plan)
    torch.testing.assert_close(logits(student, batch), logits(teacher, batch), rtol=0, atol=5e-6)


@pytest.mark.parametrize("family", ["llama", "mixtral", "bart", "t5"])
@pytest.mark.parametrize("allocate", ["global", "sensitivity"])
def test_a_budget_is_spread_over_all_kept_layers_of_both_stacks(family, allocate):
    teacher = tiny_model(family)
    own = spec(0.5, {"keep": 2, "choose": "block_influence"}, allocate=allocate, multiple_of=4)
    plan = plan_student(teacher, own, calibrate(teacher, [tiny_inputs(teacher)]))
    layers = [layer for side in layout_of(teacher).sides for layer in plan.stack(side)]
    budget = WIDTH // 2 * len(layers)
    assert budget - 4 < sum(layer.width for layer in layers) <= budget
    assert len(layers) == 2 + (LAYERS if "encoder" in layout_of(teacher).sides else 0)
    student = build_student(teacher, plan)
    for side in layout_of(teacher).sides:
        assert [mlp.width for mlp in mlps_of(student, side)] == [layer.width for layer in plan.stack(side)]
    assert torch.isfinite(logits(student, tiny_inputs(teacher))).all()


def test_experts_share_a_width_and_keep_their_own_best():
    teacher = tiny_model("mixtral")
    plan = plan_student(teacher, spec(0.5, score="magnitude"))
    for layer in plan.layers:
        assert layer.width == 24 and [len(own) for own in layer.neurons] == [24] * 4
        assert len({tuple(own) for own in layer.neurons}) > 1
    experts = mlps_of(teacher)[0]
    squares = sum(weight[2].square().sum(1) for weight in experts.weights_in) + experts.weight_out[2].square().sum(0)
    assert plan.layers[0].neurons[2] == sorted(squares.topk(24).indices.tolist())


def test_the_encoder_is_cut_by_its_own_policy():
    teacher = tiny_model("bart")
    own = spec(0.5, {"keep": [0, 3]}, {"keep": 1, "choose": "block_influence", "protect_last": 1})
    plan = plan_student(teacher, own, calibrate(teacher, [tiny_inputs(teacher)]))
    assert plan.kept_layers == [0, 3] and [layer.teacher_layer for layer in plan.encoder_layers] == [3]
    assert plan.outcomes["student.encoder_layers.keep"].got == "3"
    assert set(plan.layer_scores) == {"block_influence", "encoder_block_influence"}
    student = build_student(teacher, plan)
    assert (student.config.encoder_layers, student.config.decoder_layers) == (1, 2)


def test_only_encoder_decoders_have_an_encoder_to_cut():
    for refuse in (check_student, plan_student):
        with pytest.raises(InputError, match=r"student\.encoder_layers: .*the teacher is not an encoder-decoder"):
            refuse(tiny_model("bert"), spec(encoder={"keep": 1}, score="magnitude"))


def test_layers_of_a_teacher_that_was_not_known_before_are_refused_before_any_work():
    check_student(tiny_model("bart"), spec(layers={"keep": [0, 3]}, encoder={"keep": 4}, score="magnitude"))
    with pytest.raises(InputError, match=r"layers\.keep: keeps 5 layers, the teacher has 4.*encoder_layers\.keep\.1"):
        check_student(tiny_model("bart"), spec(layers={"keep": 5}, encoder={"keep": [0, 4]}, score="magnitude"))


def test_widths_are_reported_layer_by_layer_where_they_differ():
    plan = plan_student(tiny_model("bert"), spec([0.5, 16, 15, 1.0], score="magnitude"))
    choice = plan.outcomes["student.mlp.keep"]
    assert choice.asked == "[0.5, 16, 15, 1.0]" and choice.reason == "rounded down to a multiple of 8"
    assert choice.got == "24 of 48 in layer 0, 16 of 48 in layer 1, 8 of 48 in layer 2, 48 of 48 in layer 3"
    assert plan.mlp_allocation == "explicit"


def test_protected_layers_keep_all_their_neurons():
    plan = plan_student(tiny_model("bert"), spec(0.5, protect=[1, 2], score="magnitude"))
    assert plan.widths == [24, 48, 48, 24] and plan.layers[1].neurons is None
    assert plan.outcomes["student.mlp.keep"].reason == ""


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (spec(protect=[4], score="magnitude"), "student.mlp.protect.0: the teacher has no layer 4"),
        (spec(layers={"keep": [0, 1]}, protect=[2], score="magnitude"), "layer 2 is not among the kept layers"),
        (spec(layers={"keep": 3, "choose": "every"}, score="magnitude"), "divides the teacher's 4 layers; 3 does not"),
        (spec([0.5], score="magnitude"), "1 widths for 4 kept layers"),
        (spec(score="magnitude", allocate="sensitivity"), "`sensitivity` needs calibration data"),
    ],
)
def test_an_impossible_request_is_one_clear_error(own, words):
    with pytest.raises(InputError, match=words):
        plan_student(tiny_model("bert"), own)


def test_a_calibration_without_gradients_says_how_to_get_them():
    teacher = tiny_model("bert")
    with pytest.raises(InputError, match=r"gradients; set student\.calibration\.gradients: true|gradients: true"):
        plan_student(teacher, spec(0.5, score="taylor_kl"), calibrate(teacher, [tiny_inputs(teacher)]))


def test_a_recipe_collects_what_its_strategies_read():
    greedy = {"keep": 2, "choose": "greedy_loss"}
    assert wanted_statistics(spec()) == StatisticsRequest()
    assert wanted_statistics(spec(score="taylor")) == StatisticsRequest(gradients=True)
    assert wanted_statistics(spec(score="output_change")) == StatisticsRequest(gram=True)
    own = wanted_statistics(spec(layers={"keep": 2, "choose": "loss_drop"}, encoder=greedy))
    assert own.losses_without == ("main",) and list(own.removals) == ["encoder"]
    forced = spec(score="taylor").model_copy(update={"calibration": Student.model_fields["calibration"].default})
    forced = Student.model_validate(forced.model_dump() | {"calibration": {"gradients": False, "gram": True}})
    assert wanted_statistics(forced) == StatisticsRequest(gram=True)


def test_the_plan_names_the_statistics_it_was_made_from():
    teacher = tiny_model("bert")
    statistics = calibrate(teacher, [tiny_inputs(teacher)])
    assert plan_student(teacher, spec(), statistics).calibration == statistics.fingerprint
    assert plan_student(teacher, spec(score="magnitude")).calibration is None

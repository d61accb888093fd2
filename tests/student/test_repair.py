"""Repair in closed form: never worse than plain cutting, exact where it can be, the same for every batching."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import FORMS, LAYERS, SEQ2SEQ, WIDTH, tiny_batch, tiny_model

from distill.errors import InputError
from distill.models.family import layers_of
from distill.models.forward import Capture, capture
from distill.models.layout import LAYOUTS
from distill.models.memory import split_groups
from distill.models.mlp import mlps_of
from distill.models.plan import KeptUnits, LayerPlan, StudentPlan
from distill.recipe.schema import Repair
from distill.student import build_student
from distill.student.repair.moments import Moments, solve_ridge
from distill.student.repair.refit import Output, fit_bias, fit_refit, output_error
from distill.student.repair.steps import check_repair, repair_student

EVERY = ("llama", "bert", "gpt2", "opt", "phi3", "mixtral")
ONE_STACK = tuple(form for form in FORMS if form not in SEQ2SEQ)
PRE_NORM = (*(form for form in ONE_STACK if not LAYOUTS[form].main.normed_after), "opt", "granite")


def model_of(family, **changes):
    """A tiny model with weights of a size at which layers change something."""
    model = tiny_model(family, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


BATCHES = [tiny_batch(seed, rows=6, length=20) for seed in range(4)]


def cut(teacher, keep=(0, 2), width=0.5, neurons=None):
    """A plan that keeps these layers and random neurons of each MLP and expert (or these), and its student."""
    experts, chooser = mlps_of(teacher)[0].experts, torch.Generator().manual_seed(1)
    count = len(neurons) if neurons else int(width * WIDTH)

    def chosen():
        return neurons or sorted(torch.randperm(WIDTH, generator=chooser)[:count].tolist())

    layers = []
    for index in keep:
        own = [chosen() for _ in range(experts)] if experts else chosen()
        kept = KeptUnits(of=WIDTH, units=own if count < WIDTH else None)
        layers.append(LayerPlan(teacher_layer=index, kept={"mlp": kept}))
    names = {"layer_policy": "explicit", "mlp_score": "random", "mlp_allocation": "uniform"}
    plan = StudentPlan(model_type=teacher.config.model_type, teacher_layers=LAYERS, layers=layers, **names)
    return plan, build_student(teacher, plan)


def repaired(teacher, plan, student, batches=BATCHES, **spec):
    return list(repair_student(teacher, student, plan, batches, Repair(**spec)))


def seen(teacher, layer, batches=BATCHES):
    """Activations [N, F] of a layer's MLP at real tokens, by hand."""
    rows = []
    for batch in batches:
        found = []
        handle = mlps_of(teacher)[layer].watch(lambda x, _positions, _expert, found=found: found.append(x))
        with torch.no_grad():
            teacher.base_model(**batch)
        handle.remove()
        rows.append(found[0][batch["attention_mask"].bool().flatten()])
    return torch.cat(rows).double()


@pytest.mark.parametrize("family", ONE_STACK)
def test_a_refit_is_better_on_the_sample_and_leaves_the_teacher_alone(family):
    teacher = model_of(family)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    plan, student = cut(teacher)
    (step,) = repaired(teacher, plan, student, refit=True)
    assert step.name == "refit" and [layer.teacher_layer for layer in step.layers] == [0, 2]
    assert all(layer.mse_after < layer.mse_before for layer in step.layers) and 0 <= step.left < 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "opt", "phi3"])
def test_the_reported_errors_are_those_of_the_weights(family):
    teacher = model_of(family)
    plan, student = cut(teacher)
    sliced = [mlp.weight_out.clone() for mlp in mlps_of(student)]
    biases = [None if mlp.bias_out is None else mlp.bias_out.clone() for mlp in mlps_of(student)]
    (step,) = repaired(teacher, plan, student, refit=True)
    for layer, weight, bias in zip(step.layers, sliced, biases, strict=True):
        x, kept = seen(teacher, layer.teacher_layer), plan.layers[layer.student_layer].neurons
        full, own = mlps_of(teacher)[layer.teacher_layer], mlps_of(student)[layer.student_layer]
        target = x @ full.weight_out.double().T
        shift = 0 if bias is None else own.bias_out - bias
        after = x[:, kept] @ own.weight_out.double().T + shift
        assert layer.mse_before == pytest.approx(float((target - x[:, kept] @ weight.double().T).square().mean()))
        assert layer.mse_after == pytest.approx(float((target - after).square().mean()))
        if bias is not None:
            assert (target - after).mean(dim=0).abs().max() < 1e-6


def real_logits(model, batch=BATCHES[0]):
    with torch.no_grad():
        logits = model(**batch).logits
    return logits[batch["attention_mask"].bool()] if logits.ndim == 3 else logits


@torch.no_grad()
def test_the_repair_of_a_model_of_sentence_pairs_reads_their_token_types():
    teacher = model_of("bert")
    types = teacher.base_model.embeddings.token_type_embeddings.weight
    types[1] = 10 * types[1]
    pairs = [{**batch, "token_type_ids": (torch.arange(20) > 7).long().expand(6, 20)} for batch in BATCHES]
    plan, student = cut(teacher)
    (step,) = repaired(teacher, plan, student, pairs, bias=True)
    for layer in step.layers:
        x, kept = seen(teacher, layer.teacher_layer, pairs), plan.layers[layer.student_layer].neurons
        full, own = mlps_of(teacher)[layer.teacher_layer], mlps_of(student)[layer.student_layer]
        removed = [i for i in range(WIDTH) if i not in kept]
        expected = full.bias_out + full.weight_out[:, removed] @ x[:, removed].mean(dim=0).float()
        torch.testing.assert_close(own.bias_out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", EVERY)
def test_removed_neurons_that_do_what_kept_ones_do_are_replaced_exactly(family):
    teacher, half = model_of(family), WIDTH // 2
    with torch.no_grad():  # the upper half fires as the lower half does; what it writes is its own
        for mlp in mlps_of(teacher):
            for rows in [*mlp.weights_in, *(bias.unsqueeze(-1) for bias in mlp.biases_in)]:
                rows[..., half:, :] = rows[..., :half, :]
    plan, student = cut(teacher, range(LAYERS), neurons=list(range(half)))
    assert (real_logits(teacher) - real_logits(student)).abs().max() > 1e-2
    (step,) = repaired(teacher, plan, student, refit=True, ridge=0)
    assert step.left < 1e-9
    torch.testing.assert_close(real_logits(student), real_logits(teacher), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt"])
def test_the_bias_takes_up_the_mean_of_what_was_removed(family):
    teacher = model_of(family)
    plan, student = cut(teacher)
    (step,) = repaired(teacher, plan, student, bias=True)
    for layer in step.layers:
        x, kept = seen(teacher, layer.teacher_layer), plan.layers[layer.student_layer].neurons
        full, own = mlps_of(teacher)[layer.teacher_layer], mlps_of(student)[layer.student_layer]
        assert torch.equal(own.weight_out, full.weight_out[:, kept])
        removed = [i for i in range(WIDTH) if i not in kept]
        expected = full.bias_out + full.weight_out[:, removed] @ x[:, removed].mean(dim=0).float()
        torch.testing.assert_close(own.bias_out, expected, rtol=1e-5, atol=1e-6)
        assert layer.mse_after < layer.mse_before


def test_a_refit_after_the_bias_ends_where_the_refit_alone_ends():
    teacher = model_of("gpt2")
    plan, student = cut(teacher)
    bias, refit = repaired(teacher, plan, student, bias=True, refit=True)
    assert [layer.mse_after for layer in bias.layers] == [layer.mse_before for layer in refit.layers]
    other = build_student(teacher, plan)
    repaired(teacher, plan, other, refit=True)
    for own, alone in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own, alone)


@pytest.mark.parametrize("family", PRE_NORM)
@pytest.mark.parametrize("width", [1.0, 0.5])
def test_a_merged_layer_comes_as_close_to_the_dropped_ones_as_it_says(family, width):
    teacher = model_of(family, **({"residual_multiplier": 0.5} if family == "granite" else {}))
    plan, student = cut(teacher, (0, 3), width)
    (step,) = repaired(teacher, plan, student, merge=True)
    (layer,) = step.layers
    assert (layer.student_layer, layer.teacher_layer) == (0, 0) and layer.mse_after < layer.mse_before
    wanted, got = [], []
    for batch in BATCHES:  # the student's layer 0 gets the teacher's input, and must give the output of layer 2
        real = batch["attention_mask"].bool()
        with torch.no_grad(), capture(teacher, Capture([2])) as seen:
            teacher.base_model(**batch)
        wanted.append(seen.hidden[2][real])
        with torch.no_grad(), capture(student, Capture([0])) as seen:
            student.base_model(**batch)
        got.append(seen.hidden[0][real])
    scale = getattr(teacher.config, "residual_multiplier", 1.0)
    error = float((torch.cat(wanted) - torch.cat(got)).double().square().mean()) / scale**2
    assert layer.mse_after == pytest.approx(error, rel=1e-3)


def test_the_map_is_that_of_replaceme():
    teacher = model_of("llama")
    plan, student = cut(teacher, (1, 3), 1.0)
    repaired(teacher, plan, student, merge=True, ridge=0)
    rows = {"m": [], "change": []}
    for batch in BATCHES:
        found, real = [], batch["attention_mask"].bool()
        handle = mlps_of(teacher)[1].output.register_forward_hook(lambda _m, _a, out, found=found: found.append(out))
        with torch.no_grad(), capture(teacher, Capture([1, 2])) as seen:
            teacher.base_model(**batch)
        handle.remove()
        rows["m"].append(found[0][real])
        rows["change"].append((seen.hidden[2] - seen.hidden[1])[real])
    m, change = (torch.cat(rows[name]).double() for name in ("m", "change"))
    map_ = torch.linalg.inv(m.T @ m) @ m.T @ (change + m)
    expected = map_.T @ mlps_of(teacher)[1].weight_out.double()
    torch.testing.assert_close(mlps_of(student)[0].weight_out.double(), expected, rtol=1e-4, atol=1e-5)


def test_merging_layers_that_do_nothing_changes_nothing():
    teacher = model_of("llama")
    with torch.no_grad():
        for index in (1, 2):
            layers_of(teacher)[index].self_attn.o_proj.weight.zero_()
            layers_of(teacher)[index].mlp.down_proj.weight.zero_()
    plan, student = cut(teacher, (0, 3), 1.0)
    (step,) = repaired(teacher, plan, student, merge=True)
    assert step.left is None
    torch.testing.assert_close(real_logits(student), real_logits(teacher), rtol=0, atol=1e-5)


def test_what_there_is_nothing_to_do_for_is_said():
    teacher = model_of("llama")
    assert [step.notes for step in repaired(teacher, *cut(teacher, (2, 3), 1.0), refit=True, merge=True)] == [
        ["no neuron was removed"],
        ["the first 2 layers of the teacher have no kept layer before them"],
    ]
    (step,) = repaired(teacher, *cut(teacher, range(LAYERS)), merge=True)
    assert step.notes == ["no layer was dropped"] and step.layers == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_neither_batching_nor_padding_nor_memory_changes_the_result(family):
    teacher = model_of(family)
    plan, student = cut(teacher)
    together = repaired(teacher, plan, student, refit=True, merge=True)
    single = []
    for batch in BATCHES:
        for row in range(6):
            length = int(batch["attention_mask"][row].sum())
            single.append({name: tensor[row : row + 1, :length] for name, tensor in batch.items()})
    other = build_student(teacher, plan)
    steps = list(repair_student(teacher, other, plan, single[::-1], Repair(refit=True, merge=True), most=1))
    for one, two in zip(together, steps, strict=True):
        assert [layer.mse_after for layer in one.layers] == pytest.approx(
            [layer.mse_after for layer in two.layers], rel=1e-4
        )
    for own, alone in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_teacher_may_compute_in_another_dtype_than_the_student_is_stored_in(family):
    teacher = model_of(family)
    plan, student = cut(teacher)
    repaired(teacher.bfloat16(), plan, student, refit=True, merge=True)
    _, whole = cut(teacher := model_of(family))
    repaired(teacher, plan, whole, refit=True, merge=True)
    for mlp, other in zip(mlps_of(student), mlps_of(whole), strict=True):
        assert mlp.weight_out.dtype == torch.float32
        assert (mlp.weight_out - other.weight_out).norm() < 0.1 * other.weight_out.norm()


def test_a_strong_ridge_changes_nothing():
    teacher = model_of("llama")
    plan, student = cut(teacher)
    before = [parameter.clone() for parameter in student.parameters()]
    repaired(teacher, plan, student, refit=True, merge=True, ridge=1e12)
    for old, new in zip(before, student.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=1e-6, atol=1e-6)


def test_half_precision_students_are_not_made_worse_by_rounding():
    teacher = model_of("llama").bfloat16()
    plan, student = cut(teacher)
    (step,) = repaired(teacher, plan, student, refit=True, ridge=0)
    assert student.dtype == torch.bfloat16
    assert all(layer.mse_after <= layer.mse_before for layer in step.layers)


@pytest.mark.parametrize(
    ("family", "changes", "spec", "words"),
    [
        ("llama", {}, {"bias": True}, "repair.bias: the MLPs of llama have no output bias.*refit"),
        ("mixtral", {}, {"bias": True}, "no output bias"),
        ("bert", {}, {"merge": True}, "repair.merge: in bert a norm follows the sum"),
        ("gemma2", {}, {"merge": True}, "a norm follows the MLP's output"),
        ("opt", {"do_layer_norm_before": False}, {"merge": True}, "a norm follows the sum"),
    ],
)
def test_what_a_family_cannot_have_is_refused_with_the_reason(family, changes, spec, words):
    with pytest.raises(InputError, match=words):
        check_repair(model_of(family, **changes), Repair(**spec))
    check_repair(model_of("llama", mlp_bias=True), Repair(bias=True, merge=True))
    check_repair(model_of("opt"), Repair(bias=True, merge=True))


def test_an_encoder_decoder_is_refused():
    model = tiny_model("t5")
    with pytest.raises(InputError, match="encoder-decoder"):
        check_repair(model, Repair(refit=True))


@st.composite
def regressions(draw):
    """Moments of random neurons, some of them dead or copies, and what is kept of them."""
    size, seed = draw(st.integers(1, 9)), draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(draw(st.integers(0, 30)), size, generator=generator, dtype=torch.float64)
    x = x + torch.randn(size, generator=generator)  # means that are not 0
    x[:, draw(st.integers(0, size - 1))] = x[:, 0] * draw(st.sampled_from([0.0, 1.0, -3.0]))
    moments = Moments(size, x.device)
    moments.add(x)
    bias = torch.randn(4, generator=generator, dtype=torch.float64) if draw(st.booleans()) else None
    target = Output(torch.randn(4, size, generator=generator, dtype=torch.float64), bias)
    kept = torch.tensor(sorted(draw(st.sets(st.integers(0, size - 1), min_size=1))))
    return x, moments, target, kept


@given(regressions(), st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 1e6]))
def test_no_fit_is_worse_than_none_and_an_intercept_leaves_no_mean_error(regression, ridge):
    x, moments, target, kept = regression
    sliced = Output(target.weight[:, kept], target.bias)
    full = x @ target.weight.T + (0 if target.bias is None else target.bias)

    def rest(output):
        return full - x[:, kept] @ output.weight.T - (0 if output.bias is None else output.bias)

    before = float(rest(sliced).square().sum())
    assert output_error(moments, target, sliced, kept) == pytest.approx(before, abs=1e-8)
    for fit in (fit_bias, fit_refit):
        output = fit(moments, target, sliced, kept, ridge)
        after = float(rest(output).square().sum())
        assert after <= before * (1 + 1e-9) + 1e-9
        assert output_error(moments, target, output, kept) == pytest.approx(after, abs=1e-8)
        if target.bias is not None and len(x):
            assert rest(output).mean(dim=0).abs().max() < 1e-8


def test_a_correction_by_hand():
    # X = [1, 2], Y = [2, 4]: d = XY / (XX + ridge XX) = 10 / (5 + 5 ridge)
    inputs, cross = torch.tensor([[5.0]], dtype=torch.float64), torch.tensor([[10.0]], dtype=torch.float64)
    assert solve_ridge(inputs, cross, 0.0).item() == pytest.approx(2.0)
    assert solve_ridge(inputs, cross, 1.0).item() == pytest.approx(1.0)
    nothing = torch.zeros(2, 2, dtype=torch.float64)
    assert solve_ridge(nothing, nothing[:, :1], 0.5).tolist() == [[0.0], [0.0]]


def test_groups_fill_up_to_the_limit_in_order():
    assert list(split_groups([3, 3, 4, 9, 1], lambda size: size, 7)) == [[3, 3], [4], [9], [1]]
    assert list(split_groups([], lambda size: size, 7)) == []

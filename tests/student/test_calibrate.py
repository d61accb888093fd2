"""Every statistic against a plain loop over single examples, and what it must not depend on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_batch, tiny_inputs, tiny_model
from torch.nn import functional

from distill.errors import InputError, RunError
from distill.losses import label_loss
from distill.models.family import layers_of, layout_of
from distill.models.forward import Outputs, first_tensor, layer_input
from distill.models.mlp import mlps_of
from distill.recipe.schema import Layers
from distill.student import Statistics, calibrate
from distill.student.calibration.collect import StatisticsRequest
from distill.student.calibration.sample import content_seed, draw_classes, examples, pad_right

EVERYTHING = StatisticsRequest(gram=True, gradients=True)


def labelled(model, **settings):
    batch = tiny_inputs(model, **settings)
    if model.config.is_encoder_decoder:
        return batch
    if "Classification" in type(model).__name__:
        return {**batch, "labels": torch.arange(len(batch["input_ids"])) % 3}
    return {**batch, "labels": torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)}


def loss_of(model):
    if model.config.is_encoder_decoder:
        return None
    return label_loss("sequence" if "Classification" in type(model).__name__ else "next_token")


def slow_statistics(model, batch):
    """Per example and stack: each layer's neurons [T, F] (of experts, a list of those), input and output [T, D]."""
    seen = []
    for example in examples(batch):
        rows = {side: ({}, {}, {}) for side in layout_of(model).sides}
        handles = []
        for side, (neurons, inputs, outputs) in rows.items():
            for index, (layer, mlp) in enumerate(zip(layers_of(model, side), mlps_of(model, side), strict=True)):

                def on_layer(_m, args, kwargs, output, index=index, inputs=inputs, outputs=outputs):
                    inputs[index], outputs[index] = layer_input(args, kwargs)[0], first_tensor(output)[0]

                def on_neurons(_m, args, kwargs, index=index, neurons=neurons, mlp=mlp):
                    states, *rest = [*args, *kwargs.values()]
                    neurons[index] = slow_experts(mlp, states, rest[0]) if rest else states.flatten(0, -2)

                module = mlp.layout.out if mlp.experts is None else "mlp.experts"
                handles.append(layer.register_forward_hook(on_layer, with_kwargs=True))
                handles.append(layer.get_submodule(module).register_forward_pre_hook(on_neurons, with_kwargs=True))
        with torch.no_grad():
            model(**{name: tensor for name, tensor in example.items() if name != "labels"})
        for handle in handles:
            handle.remove()
        seen.append(rows)
    return seen


def slow_experts(mlp, states, chosen):
    """Each expert's neurons [T_e, F], token by token."""
    gate, up = mlp.weights_in
    found = []
    for expert in range(mlp.experts):
        own = [state for state, experts in zip(states, chosen, strict=True) if expert in experts]
        rows = [functional.silu(gate[expert] @ state) * (up[expert] @ state) for state in own]
        found.append(torch.stack(rows) if rows else states.new_zeros(0, mlp.width))
    return found


def expected_figures(each):
    """Mean, mean |x|, mean x², variance, Minitron's norm and products, given the neurons [T_i, F] of each example."""
    x = torch.cat(each).double()
    mean, absolute, square = (total.sum(0) / max(1, len(x)) for total in (x, x.abs(), x.square()))
    sequences = sum((own.double().abs().mean(0) if len(own) else mean * 0).square() for own in each).sqrt()
    return mean, absolute, square, square - mean.square(), sequences, x.T @ x / max(1, len(x))


def test_every_sum_is_that_of_a_plain_loop(form):
    model = tiny_model(form)
    batch = tiny_inputs(model)
    statistics, seen = calibrate(model, [batch], StatisticsRequest(gram=True)), slow_statistics(model, batch)
    for side in layout_of(model).sides:
        own, rows = statistics.of(side), [example[side] for example in seen]
        depth = len(layers_of(model, side))
        assert own.tokens == sum(len(inputs[0]) for _, inputs, _ in rows)
        for i, mlp in enumerate(mlps_of(model, side)):
            cosines = [functional.cosine_similarity(inputs[i], outputs[i], dim=-1) for _, inputs, outputs in rows]
            assert float(own.block_influence()[i]) == pytest.approx(1 - float(torch.cat(cosines).mean()), abs=1e-5)
            figures = (own.mean, own.mean_abs, own.mean_square, own.variance, own.sequence_norm, own.gram)
            for expert in range(mlp.experts or 1):
                each = [neurons[i] if mlp.experts is None else neurons[i][expert] for neurons, _, _ in rows]
                for figure, expected in zip(figures, expected_figures(each), strict=True):
                    got = figure(i) if mlp.experts is None else figure(i)[expert]
                    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)
        ends = [[inputs[0][-1], *(outputs[i][-1] for i in range(depth))] for _, inputs, outputs in rows]
        for i, j in itertools.combinations(range(depth + 1), 2):
            cosines = [float(functional.cosine_similarity(end[i], end[j], dim=0)) for end in ends]
            mean = sum(math.acos(max(-1, min(1, cosine))) / math.pi for cosine in cosines) / len(ends)
            assert float(own.angular_distance()[i, j]) == pytest.approx(mean, abs=1e-3)


def test_gates_have_the_gradient_of_a_plain_loop():
    model = tiny_model("llama")
    batch = labelled(model)
    statistics = calibrate(model, [batch], EVERYTHING, loss_of(model))
    absolute, square, drawn = 0.0, 0.0, 0.0
    for example in examples(pad_right(batch)):
        for kind in ("task", "kl"):
            found = {}

            def gated(_module, args, found=found):  # multiply the neurons of layer 1 with gates of one
                found["gate"] = torch.ones(args[0].shape[-1], requires_grad=True)
                return (args[0] * found["gate"],)

            handle = layers_of(model)[1].mlp.down_proj.register_forward_pre_hook(gated)
            logits = model(input_ids=example["input_ids"], attention_mask=example["attention_mask"]).logits[0]
            handle.remove()
            labels = (
                example["labels"][0, 1:] if kind == "task" else draw_classes(logits.detach(), content_seed(example))
            )
            loss = functional.cross_entropy(logits[: len(labels)], labels, reduction="sum")
            (c,) = torch.autograd.grad(loss, found["gate"])
            if kind == "task":
                absolute, square = absolute + c.abs(), square + c.square()
            else:
                drawn = drawn + c.square()
    for kind, total in (
        ("task_abs", absolute),
        ("task_square", square),
        ("kl_square", drawn),
    ):
        torch.testing.assert_close(statistics.gate_gradient(kind, 1).float(), total / 3, rtol=1e-3, atol=1e-7)


def test_of_a_set_of_classes_each_is_drawn_as_a_yes_or_no():
    model, batch = tiny_model("bert"), tiny_batch()
    total = 0.0
    for example in examples(pad_right(batch)):
        gates = {}

        def gated(_module, args, gates=gates):
            gates["own"] = torch.ones(args[0].shape[-1], requires_grad=True)
            return (args[0] * gates["own"],)

        handle = layers_of(model)[1].output.dense.register_forward_pre_hook(gated)
        logits = model(**example).logits[0]
        handle.remove()
        drawn = draw_classes(torch.stack([torch.zeros_like(logits), logits], -1).detach(), content_seed(example))
        loss = functional.binary_cross_entropy_with_logits(logits, drawn.float(), reduction="sum")
        total = total + torch.autograd.grad(loss, gates["own"])[0].square()
    statistics = calibrate(model, [batch], StatisticsRequest(gradients=True), sets=True)
    torch.testing.assert_close(statistics.gate_gradient("kl_square", 1).float(), total / 3, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "phi3", "t5-gated", "bert", "whisper"])
def test_the_gate_gradient_holds_for_every_form_of_weight(name):
    # Scaling a neuron's column of the output weights by 1 + h opens its gate by h.
    model, h = tiny_model(name), 0.05
    batch = tiny_inputs(model, rows=1)
    got = calibrate(model, [batch], EVERYTHING).gate_gradient("kl_square", 0)
    got = (got[0] if got.ndim == 2 else got).sqrt()  # the first expert's
    neuron = int(got.argmax())

    def logits():
        with torch.no_grad():
            return model(**batch).logits.flatten(0, -2).double()

    classes, weight = draw_classes(logits().float(), content_seed(batch)), mlps_of(model)[0].weight_out.data
    column = weight[0, :, neuron] if weight.ndim == 3 else weight[:, neuron]
    original, losses = column.clone(), []
    for factor in (1 + h, 1 - h):
        column.copy_(original * factor)
        losses.append(functional.cross_entropy(logits(), classes, reduction="sum"))
    torch.testing.assert_close(got[neuron], (losses[0] - losses[1]).abs() / (2 * h), rtol=0.02, atol=1e-5)


def padded_left(batch):
    """The same texts, with what fills up the rows of `attention_mask` in front of them."""
    mask = batch.get("attention_mask")
    moved = dict(batch)
    for name in [name for name, tensor in batch.items() if mask is not None and tensor.shape == mask.shape]:
        rows = zip(batch[name], mask, strict=True)
        moved[name] = torch.stack([row.roll(int((own == 0).sum())) for row, own in rows])
    return moved


def test_statistics_do_not_depend_on_batching_order_or_padding(form):
    model = tiny_model(form)
    together = tiny_inputs(model, rows=4)
    whole = calibrate(model, [together])
    rows = [{name: tensor[i : i + 1] for name, tensor in together.items()} for i in range(4)]
    for other in (calibrate(model, rows[::-1]), calibrate(model, [padded_left(together)])):
        assert other.sums.keys() == whole.sums.keys()
        for name, total in whole.sums.items():
            torch.testing.assert_close(other.sums[name], total, rtol=1e-4, atol=1e-4, msg=name)


def test_entries_that_no_model_reads_are_left_out_and_token_types_are_read():
    model = tiny_model("bert")
    batch = labelled(model)
    wanted = StatisticsRequest(False, True, ("main",))
    plain = calibrate(model, [batch], wanted, loss_of(model))
    extra = {**batch, "document_ids": torch.zeros_like(batch["input_ids"])}
    assert calibrate(model, [extra], wanted, loss_of(model)).fingerprint == plain.fingerprint
    pairs = {**batch, "token_type_ids": torch.ones_like(batch["input_ids"])}
    typed = calibrate(model, [pairs], wanted, loss_of(model))
    for name in ("main.0.sum", "main.0.kl_square", "main.without"):
        assert not torch.allclose(typed.sums[name], plain.sums[name])


def test_gradient_statistics_do_not_depend_on_batching():
    model = tiny_model("qwen2")
    batch = labelled(model, rows=4)
    rows = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(4)]
    whole, parts = (calibrate(model, sample, EVERYTHING, loss_of(model)) for sample in ([batch], rows[::-1]))
    for name, total in whole.sums.items():
        torch.testing.assert_close(parts.sums[name], total, rtol=1e-4, atol=1e-6, msg=name)


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama").train()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.model.layers[1].eval()
    before = {name: (parameter.clone(), parameter.requires_grad) for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    wanted = StatisticsRequest(True, True, ("main",), {"main": Layers(keep=3, choose="greedy_loss")})
    calibrate(model, [labelled(model)], wanted, loss_of(model))
    assert [module.training for module in model.modules()] == modes
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None or name == "lm_head.weight"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def slow_loss(model, batch, kept):
    """The labels' loss of a model with only these layers."""
    layers = layers_of(model)
    every = list(layers)
    layers._modules = {str(i): every[index] for i, index in enumerate(kept)}
    depth, model.config.num_hidden_layers = model.config.num_hidden_layers, len(kept)
    try:
        with torch.no_grad():
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        total, count = loss_of(model)(Outputs(output.logits), batch)
        return float(total) / count
    finally:
        layers._modules, model.config.num_hidden_layers = {str(i): layer for i, layer in enumerate(every)}, depth


def test_losses_without_layers_are_those_of_models_without_them():
    model = tiny_model("llama")
    batch = labelled(model)
    wanted = StatisticsRequest(
        losses_without=("main",), removals={"main": Layers(keep=1, choose="greedy_loss", protect_last=1)}
    )
    statistics = calibrate(model, [batch], wanted, loss_of(model))
    expected = [slow_loss(model, batch, [i for i in range(4) if i != gone]) for gone in range(4)]
    torch.testing.assert_close(
        statistics.loss_without(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0
    )
    left, order = [0, 1, 2, 3], []
    while len(left) > 1:
        losses = {gone: slow_loss(model, batch, [i for i in left if i != gone]) for gone in left[:-1]}
        order.append(min(losses, key=losses.get))
        left.remove(order[-1])
    assert statistics.removals == order


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_in_bf16_the_statistics_are_those_of_fp32_but_for_rounding(family):
    model = tiny_model(family)
    batch, stacks = labelled(model), tuple(layout_of(model).sides)
    wanted = StatisticsRequest(gradients=True, losses_without=stacks if family != "t5" else ())
    exact, rounded = (calibrate(model, [batch], wanted, loss_of(model), precision=name) for name in ("fp32", "bf16"))
    for name, total in exact.sums.items():
        assert rounded.sums[name].dtype == torch.float64
        assert (rounded.sums[name] - total).norm() <= 0.1 * total.norm(), (
            name
        )  # squares of gradients are off by twice as much
        assert not torch.equal(rounded.sums[name], total) or not name.endswith((".abs", ".kl_square", ".without"))


def test_losses_without_layers_need_a_label():
    model = tiny_model("bert")
    batch = {**tiny_batch(), "labels": torch.full((3,), -100)}
    with pytest.raises(InputError, match="no example of the calibration sample has one"):
        calibrate(model, [batch], StatisticsRequest(losses_without=("main",)), loss_of(model))


def test_unlabelled_examples_have_no_part_in_the_labels_gradient():
    model = tiny_model("bert")
    batch = labelled(model)
    batch["labels"] = torch.tensor([1, -100, 2])
    statistics = calibrate(model, [batch], EVERYTHING, loss_of(model))
    assert statistics.sums["main.task_examples"] == 2 and statistics.sums["main.kl_examples"] == 3


def test_an_empty_sample_and_a_broken_teacher_are_refused():
    model = tiny_model("bert")
    with pytest.raises(RunError, match="no token"):
        calibrate(model, [])
    with torch.no_grad():
        layers_of(model)[0].intermediate.dense.weight[0, 0] = torch.inf
    with pytest.raises(RunError, match="not finite"):
        calibrate(model, [tiny_batch()])


def test_figures_that_were_not_collected_are_named_with_the_key():
    statistics = calibrate(tiny_model("bert"), [tiny_batch()])
    for kind in ("task_abs", "task_square", "kl_square"):
        with pytest.raises(InputError, match=r"student\.calibration\.gradients: true"):
            statistics.gate_gradient(kind, 0)
    with pytest.raises(InputError, match=r"student\.calibration\.gram: true"):
        statistics.gram(0)
    with pytest.raises(InputError, match="loss_drop"):
        statistics.loss_without()
    with pytest.raises(InputError, match="greedy_loss"):
        _ = statistics.removals


def test_a_calibration_file_round_trips_and_another_one_is_refused(tmp_path):
    path, statistics = tmp_path / "c.safetensors", calibrate(tiny_model("mixtral"), [tiny_batch()], EVERYTHING)
    statistics.save(path)
    again = Statistics.load(path)
    assert again.fingerprint == statistics.fingerprint and torch.equal(again.gram(1), statistics.gram(1))
    content = path.read_bytes()
    changed = bytes([*content[:-1], content[-1] ^ 1])
    for broken in (b"", content[:20], content[:-1], changed):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="calibration file"):
            Statistics.load(path)


@given(st.integers(0, 2**40))
@settings(max_examples=20, deadline=None)
def test_classes_are_drawn_from_the_softmax(seed):
    logits = torch.log(torch.tensor([0.0, 0.7, 0.3, 0.0])).repeat(4000, 1)
    drawn = draw_classes(logits, seed)
    assert torch.equal(drawn, draw_classes(logits, seed)) and set(drawn.tolist()) == {1, 2}
    assert abs(float((drawn == 1).float().mean()) - 0.7) < 0.05


def test_classes_that_are_as_many_as_tokens_are_not_cut_with_them():
    batch = {
        "input_ids": torch.tensor([[0, 7, 8]]),
        "attention_mask": torch.tensor([[0, 1, 1]]),
        "labels": torch.tensor([[1, 0, 1]]),
    }
    [alone] = examples(pad_right(batch, True), True)
    assert alone["input_ids"].tolist() == [[7, 8]] and alone["labels"].tolist() == [[1, 0, 1]]

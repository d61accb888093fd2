"""Taking dead neurons out changes no output, whatever the layout, and leaves alone what only looks dead."""

from __future__ import annotations

import pytest
import torch
from tiny import LAYERS, WIDTH, tiny_inputs, tiny_model

from distill import load_student
from distill.models.family import layout_of
from distill.models.mlp import mlps_of
from distill.models.widths import is_unequal
from distill.recipe.schema import Mask
from distill.student.masks.compact import compact, constant_of
from distill.student.masks.masks import Masks


def logits(model):
    with torch.no_grad():
        return model(**tiny_inputs(model)).logits


def silence(model, layer, neurons, *, rows=True, column=False, biases=False):
    """Zero the chosen parts of some neurons of one layer."""
    mlp = mlps_of(model)[layer]
    with torch.no_grad():
        for weight in mlp.weights_in if rows else []:
            weight[..., neurons, :] = 0
        for bias in mlp.biases_in if biases else []:
            bias[neurons] = 0
        if column:
            mlp.weight_out[..., neurons] = 0


@pytest.mark.parametrize("uniform", [True, False])
def test_a_masked_model_and_its_compact_form_are_the_same(form, uniform):
    model = tiny_model(form)
    Masks(model, Mask(per="neuron", sparsity=0.25), 1).after_step(0)
    Masks(model, Mask(per="neuron", sparsity=1 / 3, only=["*.2.*"]), 1).after_step(0)  # more in one layer
    mlps = [mlp for side in layout_of(model).sides for mlp in mlps_of(model, side)]
    before = logits(model)
    old = [mlp.width for mlp in mlps]
    gone = compact(model, uniform=uniform, multiple_of=4)  # experts are multiplied in blocks of 16 bytes
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    widths = [mlp.width for mlp in mlps]
    assert gone == sum((a - b) * (mlp.experts or 1) for a, b, mlp in zip(old, widths, mlps, strict=True))
    assert is_unequal(model.config) != uniform
    assert sorted(set(widths)) == [36] if uniform else [32, 36]


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "mixtral", "t5-gated"])
def test_a_compact_model_reloads_as_the_same(family, tmp_path):
    model = tiny_model(family)
    Masks(model, Mask(per="neuron", sparsity=0.25), 1).after_step(0)
    compact(model, uniform=True, multiple_of=4)
    model.save_pretrained(tmp_path / "uniform")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "uniform")), logits(model))
    silence(model, 0, slice(0, 16), column=True)
    compact(model, multiple_of=4)
    model.save_pretrained(tmp_path / "unequal")
    assert torch.equal(logits(load_student(tmp_path / "unequal")), logits(model))
    compact(model, multiple_of=4)  # from widths that differ already
    silence(model, 1, slice(0, 8), column=True)
    before = logits(model)
    compact(model, multiple_of=4)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_student(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox", "opt"])
def test_what_a_silent_neuron_still_emits_moves_into_the_output_bias(family):
    model = tiny_model(family)
    silence(model, 2, list(range(8)))  # rows are zero, biases are not: act(b) is emitted at every position
    mlp = mlps_of(model)[2]
    constants = constant_of(mlp)
    assert (constants[:8] != 0).any() and constants[8:].isnan().all()
    before, bias = logits(model), mlp.bias_out.clone()
    assert compact(model) == 8
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    assert not torch.equal(mlps_of(model)[2].bias_out, bias)


def test_the_folded_constant_by_hand():
    model = tiny_model("bert")
    silence(model, 0, [3])
    mlp = mlps_of(model)[0]
    with torch.no_grad():
        mlp.biases_in[0][3] = 1.0
    emitted = 0.8413447460685429  # GELU(1) = Phi(1)
    expected = mlp.bias_out + emitted * mlp.weight_out[:, 3]
    compact(model)
    torch.testing.assert_close(mlps_of(model)[0].bias_out, expected)


def test_a_dead_neuron_that_stays_to_fill_a_multiple_is_not_folded_as_well():
    model = tiny_model("bert")
    silence(model, 1, list(range(6)))  # 42 live ones, so two of the six stay and emit what they emitted
    before = logits(model)
    assert compact(model, multiple_of=4) == 4 and mlps_of(model)[1].width == 44
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)


def test_a_glu_with_biases_folds_gate_times_up_and_needs_an_output_bias():
    model = tiny_model("llama", mlp_bias=True)
    silence(model, 0, [4, 7])
    mlp = mlps_of(model)[0]
    gate, up = mlp.biases_in
    expected = torch.nn.functional.silu(gate[[4, 7]].double()) * up[[4, 7]].double()
    torch.testing.assert_close(constant_of(mlp)[[4, 7]], expected)
    before = logits(model)
    assert compact(model) == 2
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)


def test_without_an_output_bias_a_neuron_that_still_emits_stays():
    model = tiny_model("modernbert", mlp_bias=True)
    mlp = mlps_of(model)[0]
    mlp.layer.get_submodule(mlp.layout.out).bias = None
    silence(model, 0, [1])
    silence(model, 0, [2], biases=True)
    before = logits(model)
    assert compact(model) == 1  # neuron 2 emits act(0) * 0 = 0
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [0, 1])
def test_one_silent_half_of_a_gated_neuron_is_enough(side):
    model = tiny_model("qwen2")
    mlp = mlps_of(model)[1]
    with torch.no_grad():
        mlp.weights_in[side][10] = 0  # silu(0) = 0, and anything times up = 0
    before = logits(model)
    assert compact(model) == 1 and mlps_of(model)[1].width == WIDTH - 1
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)


def test_experts_lose_what_all_of_them_can():
    model = tiny_model("mixtral")
    with torch.no_grad():
        weight = mlps_of(model)[0].weight_out
        weight[:, :, :8] = 0
        weight[1, :, 8:16] = 0  # one expert could lose sixteen, the others eight
    before = logits(model)
    assert compact(model) == 8 * mlps_of(model)[0].experts
    assert [mlp.width for mlp in mlps_of(model)] == [WIDTH - 8] + [WIDTH] * (LAYERS - 1)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)


def test_widths_are_rounded_up_to_a_multiple_and_never_to_nothing():
    model = tiny_model("llama")
    silence(model, 0, list(range(13)), column=True)
    silence(model, 1, list(range(WIDTH)), column=True)
    before = logits(model)
    compact(model, multiple_of=8)
    assert [mlp.width for mlp in mlps_of(model)] == [40, 8, WIDTH, WIDTH]
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "mixtral", "bart"])
def test_a_model_without_dead_neurons_is_left_as_it_is(family):
    model = tiny_model(family)
    before, config = logits(model), model.config.to_dict()
    assert compact(model) == 0
    assert torch.equal(logits(model), before) and model.config.to_dict() == config

"""A teacher in 8 bits in floating point: a CPU emulates the products that a recent GPU takes."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_batch, tiny_model, tiny_project
from torch import nn

from distill.errors import InputError
from distill.models.family import all_layers
from distill.models.forward import Capture, forward
from distill.models.fp8 import Fp8Linear, fault_of, quantise_layers, rounded
from distill.pipeline import RunDir, Session
from distill.pipeline.data import work as prepare_data
from distill.pipeline.teachers import quantise_teacher
from distill.pipeline.train_checks import check_labels
from distill.recipe import load_recipe


def test_rows_are_rounded_to_three_bits_of_mantissa_with_the_largest_at_the_top():
    values = torch.tensor([[448.0, 17.0, 0.0], [-1.0, 0.5, 0.26], [0.0, 0.0, 0.0]])
    eight, scale = rounded(values)
    # Steps between 16 and 32 are 2, those of the second row's 0.26 · 448 = 116.48 are 8.
    expected = torch.tensor([[448.0, 16.0, 0.0], [-1.0, 0.5, 120 / 448], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(eight.float() * scale, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_a_map_in_8_bits_is_the_product_of_what_is_rounded(bias):
    torch.manual_seed(0)
    linear, states = nn.Linear(32, 48, bias=bias).bfloat16(), torch.randn(2, 5, 32).bfloat16()
    (rows, row_scale), (weight, scale) = rounded(states.flatten(0, 1)), rounded(linear.weight)
    by_hand = (rows.float() * row_scale) @ (weight.float() * scale).T
    by_hand = by_hand if linear.bias is None else by_hand + linear.bias.float()
    eight = Fp8Linear(linear)
    found = eight(states)
    assert found.dtype == torch.bfloat16 and found.shape == (2, 5, 48)
    torch.testing.assert_close(found.float().flatten(0, 1), by_hand, rtol=2e-2, atol=2e-2)
    assert eight.eight.element_size() == 1 and eight.weight.is_meta and eight(states.float()).dtype == torch.float32


@pytest.mark.parametrize(("family", "left"), [("llama", 0), ("bert", 0), ("gpt2", 16), ("mixtral", 12), ("t5", 2)])
def test_linear_maps_of_the_layers_are_replaced_and_what_is_left_is_counted(family, left):
    model, batch = tiny_model(family).bfloat16(), tiny_batch(padded=False)
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    capture = Capture(hidden=(0,), stop_at_head=True)
    with torch.no_grad():
        before = forward(model, batch, capture).hidden[0]
        done, counted = quantise_layers(model)
        after = forward(model, batch, capture).hidden[0]
    maps = [module for layer in all_layers(model) for module in layer.modules() if isinstance(module, nn.Linear)]
    assert all(isinstance(module, Fp8Linear) for module in maps) and (len(maps), counted) == (done, left)
    assert not done or 0 < (after - before).norm() <= 0.1 * before.norm()
    assert not isinstance(model.get_output_embeddings(), Fp8Linear)


def session_of(folder, *overrides):
    lines = []
    recipe = load_recipe(tiny_project(folder), ["teacher.dtype=fp8", *overrides])
    session = Session(recipe, folder, RunDir(folder / "run"), lines.append)
    prepare_data(session)
    return session, lines


def test_the_change_of_a_teacher_in_fp8_is_measured_on_the_data_and_limited(tmp_path):
    session, lines = session_of(tmp_path)
    model = tiny_model("bert", num_labels=len(session.corpus.classes)).requires_grad_(False)
    assert quantise_teacher(session, model) is model and model.dtype == torch.bfloat16
    assert lines[-1].startswith("  the teacher in fp8: 24 linear maps; KL from its stored weights ")
    assert lines[-1].endswith(" nats on 16 positions") and 0 < float(lines[-1].split()[-5]) < 0.02
    strict, _ = session_of(tmp_path, "teacher.fp8_max_kl=1e-9")
    with pytest.raises(InputError, match=r"more than fp8_max_kl: 1e-09; use bf16, or raise fp8_max_kl"):
        quantise_teacher(strict, tiny_model("bert", num_labels=len(session.corpus.classes)))


def test_numbers_have_no_divergence_to_judge_fp8_by(tmp_path):
    session, _ = session_of(tmp_path, "losses=[{match: logits, loss: logit_mse}]")
    vars(session)["corpus"] = type("Corpus", (), {"head": "regression", "labelled": [0]})()
    with pytest.raises(InputError, match="judged by KL, which numbers do not have"):
        check_labels(session)


def test_a_device_that_cannot_multiply_them_is_told():
    assert fault_of(torch.device("cpu")) == "needs a GPU"

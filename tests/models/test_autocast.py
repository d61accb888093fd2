"""The precision of a recipe wherever models run: fp32 weights are multiplied in it, others decide themselves."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_batch, tiny_model

from distill.evaluation.predict import predict
from distill.models.forward import Capture
from distill.models.precision import autocast_for, describe_precision
from distill.teacher import LiveTeacher

CPU = torch.device("cpu")


def product_in(model, precision):
    with autocast_for(model, precision):
        return torch.nn.functional.linear(torch.ones(1, 4), torch.ones(4, 4)).dtype


def test_fp32_weights_compute_in_the_precision_of_the_recipe_and_others_in_their_own():
    model = tiny_model("bert")
    assert product_in(model, "bf16") == torch.bfloat16 and product_in(model, "fp32") == torch.float32
    assert describe_precision(model, "bf16") == "bf16 autocast over float32 weights"
    assert describe_precision(model, "fp32") == "float32"
    half = tiny_model("bert").bfloat16()
    assert product_in(half, "bf16") == torch.float32  # no autocast: its own products are bf16 anyway
    assert describe_precision(half, "bf16") == describe_precision(half, "fp32") == "bfloat16"


def test_an_autocast_around_it_is_off_for_fp32():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product_in(tiny_model("bert"), "fp32") == torch.float32


def batch_of(model):
    batch = tiny_batch(rows=8, padded=False) | {"examples": torch.arange(8)}
    head = "next_token" if model.config.model_type == "llama" else "sequence"
    return head, batch | {"labels": batch["input_ids"] if head == "next_token" else torch.arange(8) % 3}


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_predictions_are_those_of_a_model_under_autocast(family):
    model = tiny_model(family)
    head, batch = batch_of(model)
    rows = {precision: predict(model, [batch], head, precision=precision) for precision in ("fp32", "bf16")}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
    found = {name: own["nll"].sum() / own["tokens"].sum() for name, own in rows.items()}
    assert found["bf16"] != found["fp32"] and found["bf16"] == pytest.approx(found["fp32"], rel=0.01)
    assert found["bf16"] == pytest.approx(wanted, rel=0.005)  # whose logits are bf16, and ours fp32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_teacher_keeps_its_own_precision_beside_a_student_of_another(precision):
    model = tiny_model("llama")
    _, batch = batch_of(model)
    teacher = LiveTeacher(model, Capture(hidden=(3,)), CPU, precision)
    expected = teacher(batch).hidden[3]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "fp32"):
        assert torch.equal(teacher(batch).hidden[3], expected)
    plain = LiveTeacher(model, Capture(hidden=(3,)), CPU)(batch).hidden[3]
    assert torch.equal(plain, expected) is (precision == "fp32")


def test_a_model_does_not_diverge_from_itself_in_the_same_precision():
    model = tiny_model("llama")
    head, batch = batch_of(model)
    live = {name: LiveTeacher(model, Capture(stop_at_head=True), CPU, name) for name in ("fp32", "bf16")}
    assert (predict(model, [batch], head, live["bf16"], precision="bf16")["kl_sum"] == 0).all()
    assert (predict(model, [batch], head, live["fp32"], precision="bf16")["kl_sum"] > 0).all()

"""The precision of the output head's operands: its price, the choice by the distance to the teacher, and the switch."""

from __future__ import annotations

import math

import pytest
import torch

from distill.losses import LOGITS, Objective
from distill.losses.precision import choose_precision, estimate_kl
from distill.models.forward import Outputs
from distill.models.head import OutputHead, products
from distill.recipe.schema import Term

POSITIONS, D, V = 64, 96, 3000


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(near):
    """A student's and a teacher's head that differ by a share `near`, and what both read."""
    target = draw(V, D) / 4
    return (target + near / 4 * draw(V, D, seed=1)), target, draw(1, POSITIONS, D, seed=2)


def learn(near, precision, dtype=torch.float32, loss="forward_kl"):
    student, teacher, last = (tensor.to(dtype) for tensor in heads(near))
    weight, rows = student.requires_grad_(), last.clone().requires_grad_()
    objective = Objective([Term(match="logits", loss=loss)], "next_token", head_precision=precision)
    batch = {"attention_mask": torch.ones(1, POSITIONS), "labels": torch.zeros(1, POSITIONS, dtype=torch.int64)}
    own, theirs = Outputs(None, {}, rows, OutputHead(weight)), Outputs(None, {}, last, OutputHead(teacher))
    loss_, _ = objective(own, theirs, batch, objective.counts([batch]))
    loss_.backward()
    return loss_.item(), weight.grad, rows.grad


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def test_operands_in_bf16_falsify_the_gradient_the_more_the_nearer_the_teacher_is():
    found = []
    for near in (1.0, 0.1, 0.02):
        kl, exact, _ = learn(near, None, torch.float64)
        found.append((kl, error(learn(near, "bf16")[1], exact), error(learn(near, "fp32")[1], exact)))
    assert [kl for kl, *_ in found] == sorted((kl for kl, *_ in found), reverse=True)
    for kl, bf16, fp32 in found[1:]:
        assert 1e-3 < bf16 * math.sqrt(kl) < 1e-2 and fp32 < 1e-3  # the constant of `ERROR_AT_ONE`, 4e-3
    assert found[0][1] < 0.02 < found[2][1]


@pytest.mark.parametrize("name", [name for name in LOGITS if name not in ("soft_cross_entropy", "total_variation")])
def test_near_the_teacher_every_divergence_tells_the_kl(name):
    teacher = draw(50, 400)
    student = teacher + 0.05 * draw(50, 400, seed=1)
    kl = LOGITS["forward_kl"](student, teacher).mean().item()
    params = {"jsd": {"beta": 0.3}, "skew_forward_kl": {"alpha": 0.2}, "skew_reverse_kl": {"alpha": 0.4}}.get(name, {})
    value = LOGITS[name](student, teacher, temperature=2.0, **params).mean().item() * 4
    assert estimate_kl(name, value, params) == pytest.approx(kl, rel=0.35)


def test_no_rounding_is_small_for_the_total_variation():
    assert choose_precision(estimate_kl("total_variation", 0.5, {})) == "fp32"


def test_the_kl_of_a_loss_of_ones_own_is_not_known():
    assert estimate_kl("", 1.0, {}) is None and choose_precision(None) == "tf32"


@pytest.mark.parametrize(
    ("kl", "chosen"), [(math.inf, "bf16"), (1.0, "bf16"), (0.041, "bf16"), (0.039, "tf32"), (7e-4, "tf32"),
                       (6e-4, "fp32"), (0.0, "fp32"), (math.nan, "tf32")],
)  # fmt: skip
def test_the_choice_keeps_the_error_below_two_percent(kl, chosen):
    """0.004 / sqrt(KL) = 0.02 at KL = 0.04, 0.0005 / sqrt(KL) = 0.02 at 0.000625."""
    assert choose_precision(kl) == chosen


def test_the_choice_follows_the_nearest_term_and_is_said_when_it_changes():
    terms = [Term(match="labels"), Term(match="logits", temperature=2.0),
             Term(match="logits", loss="jsd", scale_by_temperature=False, temperature=2.0)]  # fmt: skip
    objective = Objective(terms, "next_token")
    line = objective.adapt_head_precision({"labels": 3.0, "logits.forward_kl": 0.5, "logits.jsd": 0.004})
    assert objective.head_precision == "bf16" and "bf16" in line  # 0.004 · 4 (temperature²) · 4 (jsd) = 0.064
    values = {"labels": 3.0, "logits.forward_kl": 0.01, "logits.jsd": None}
    assert "tf32" in objective.adapt_head_precision(values) and objective.head_precision == "tf32"
    assert objective.adapt_head_precision(values) is None


def test_labels_alone_leave_the_operands_in_bf16():
    objective = Objective([Term(match="labels")], "next_token")
    objective.adapt_head_precision({"labels": 1e-6})
    assert objective.head_precision == "bf16"


def test_the_setting_of_torch_is_put_back():
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    with products("bf16", torch.device("cpu")):
        assert setting.fp32_precision == "bf16"
    assert setting.fp32_precision == before
    for precision in ("tf32", "fp32", None):  # nothing that a CPU has
        with products(precision, torch.device("cpu")):
            assert setting.fp32_precision == before

"""One battery for every loss in the tables, then what is particular to logits."""

from functools import partial
from itertools import pairwise
from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import HIDDEN, LOGITS
from distill.losses.align import align
from distill.models.topk import TopK

EVERY = LOGITS | HIDDEN
WITH_OWN = [("jsd", "beta", 0.25), ("skew_forward_kl", "alpha", 0.25), ("skew_reverse_kl", "alpha", 0.25)]
EXTREME = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, 0.0]])


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def numbers(size: int):
    return st.lists(st.floats(-60, 60, width=32), min_size=size, max_size=size)


# The battery


def test_it_is_exactly_zero_at_equality():
    for name in sorted(set(EVERY) - {"soft_cross_entropy"}):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            same = noise(7, 33, dtype=dtype) * 20
            assert (EVERY[name](same, same.clone()) == 0).all(), name


@given(numbers(5), numbers(5), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_it_is_never_negative(student, teacher, dtype):
    for name in EVERY:
        assert EVERY[name](torch.tensor(student, dtype=dtype), torch.tensor(teacher, dtype=dtype)) >= 0, name


def test_it_is_never_negative_nearly_at_equality():
    for name in EVERY:
        student = noise(50, 1000)
        assert (EVERY[name](student, student + 1e-6 * noise(50, 1000, seed=1)) >= 0).all(), name


def test_it_returns_one_value_per_position():
    for name in EVERY:
        for lead in [(), (3,), (2, 3), (0,)]:
            assert EVERY[name](noise(*lead, 5), noise(*lead, 5, seed=1)).shape == lead, name


def test_it_computes_in_fp32_whatever_it_is_given():
    for name in EVERY:
        student, teacher = noise(4, 9, dtype=torch.bfloat16), noise(4, 9, seed=1, dtype=torch.bfloat16)
        value = EVERY[name](student, teacher)
        assert value.dtype == torch.float32, name
        assert torch.equal(value, EVERY[name](student.float(), teacher.float())), name


def test_value_and_gradient_are_finite_at_extremes():
    for name in EVERY:
        for teacher in (EXTREME, EXTREME.roll(1, 0), EXTREME.roll(2, 0)):
            student = EXTREME.clone().requires_grad_()
            value = EVERY[name](student, teacher)
            value.sum().backward()
            assert value.isfinite().all() and student.grad.isfinite().all(), name


def test_its_gradient_is_the_derivative_of_its_value():
    for name in EVERY:
        student = noise(3, 5, dtype=torch.float64).requires_grad_()
        teacher = noise(3, 5, seed=1, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(EVERY[name], (student, teacher)), name


def test_different_positions_are_refused():
    for name in EVERY:
        with pytest.raises(ValueError, match=r"\(2, 5\).*\(3, 5\)"):
            EVERY[name](noise(2, 5), noise(3, 5))


# Numbers derived by hand, for T = (1/2, 1/4, 1/4) and S = (1/8, 1/8, 3/4)

TEACHER = torch.tensor([1 / 2, 1 / 4, 1 / 4]).log()
STUDENT = torch.tensor([1 / 8, 1 / 8, 3 / 4]).log()
GOLDEN = {
    # T/S = 4, 2, 1/3, so sum T log(T/S) = 1/2 log 4 + 1/4 log 2 - 1/4 log 3
    "forward_kl": 5 / 4 * log(2) - 1 / 4 * log(3),
    # sum S log(S/T) = -1/8 log 4 - 1/8 log 2 + 3/4 log 3
    "reverse_kl": 3 / 4 * log(3) - 3 / 8 * log(2),
    # half the sum of the two above
    "symmetric_kl": (7 / 8 * log(2) + 1 / 2 * log(3)) / 2,
    # M = (T + S)/2 = 5/16, 3/16, 1/2; T/M = 8/5, 4/3, 1/2; S/M = 2/5, 2/3, 3/2
    "jsd": (
        1 / 2 * log(8 / 5) + 1 / 4 * log(4 / 3) - 1 / 4 * log(2)
        + 1 / 8 * log(2 / 5) + 1 / 8 * log(2 / 3) + 3 / 4 * log(3 / 2)
    ) / 2,
    # M = T/10 + 9S/10 = 13/80, 11/80, 7/10; T/M = 40/13, 20/11, 5/14
    "skew_forward_kl": 1 / 2 * log(40 / 13) + 1 / 4 * log(20 / 11) + 1 / 4 * log(5 / 14),
    # M = 9T/10 + S/10 = 37/80, 19/80, 3/10; S/M = 10/37, 10/19, 5/2
    "skew_reverse_kl": 1 / 8 * log(10 / 37) + 1 / 8 * log(10 / 19) + 3 / 4 * log(5 / 2),
    # (3/8 + 1/8 + 1/2) / 2
    "total_variation": 1 / 2,
    # -1/2 log 1/8 - 1/4 log 1/8 - 1/4 log 3/4 = 9/4 log 2 + 1/4 (2 log 2 - log 3)
    "soft_cross_entropy": 11 / 4 * log(2) - 1 / 4 * log(3),
    # |T - S| = 3/8, 1/8, 1/2 and the head is the first token: 3/8 of the forward, 5/8 of the reverse KL
    "adaptive_kl": 3 / 8 * (5 / 4 * log(2) - 1 / 4 * log(3)) + 5 / 8 * (3 / 4 * log(3) - 3 / 8 * log(2)),
    # the first token and the rest: 1/2 log 4 + 1/2 log(4/7); within the rest T is 1/2, 1/2 and S 1/7, 6/7, which makes
    # 1/2 log 7/2 + 1/2 log 7/12, with half the probability and beta = 2; together log 2 + 1/2 log(4/7 · 7/2 · 7/12)
    "tail_aware_kl": log(2) + 1 / 2 * log(7 / 6),
    # the logits differ by log 4, log 2, -log 3
    "logit_mse": (5 * log(2) ** 2 + log(3) ** 2) / 3,
}  # fmt: skip
GOLDEN_OWN = {
    # beta = 1/4: M = T/4 + 3S/4 = 7/32, 5/32, 5/8; T/M = 16/7, 8/5, 2/5; S/M = 4/7, 4/5, 6/5
    "jsd": 1 / 4 * (1 / 2 * log(16 / 7) + 1 / 4 * log(8 / 5) + 1 / 4 * log(2 / 5))
    + 3 / 4 * (1 / 8 * log(4 / 7) + 1 / 8 * log(4 / 5) + 3 / 4 * log(6 / 5)),
    # alpha = 1/4: the same M
    "skew_forward_kl": 1 / 2 * log(16 / 7) + 1 / 4 * log(8 / 5) + 1 / 4 * log(2 / 5),
    # alpha = 1/4: M = 3T/4 + S/4 = 13/32, 7/32, 3/8; S/M = 4/13, 4/7, 2
    "skew_reverse_kl": 1 / 8 * log(4 / 13) + 1 / 8 * log(4 / 7) + 3 / 4 * log(2),
    # head = 0.6: the first two tokens, with 3/8 + 1/8 of the differences
    "adaptive_kl": 1 / 2 * (5 / 4 * log(2) - 1 / 4 * log(3)) + 1 / 2 * (3 / 4 * log(3) - 3 / 8 * log(2)),
}


def test_it_gives_the_number_derived_by_hand():
    for name in LOGITS:
        assert LOGITS[name](STUDENT, TEACHER).item() == pytest.approx(GOLDEN[name], rel=1e-6), name


@pytest.mark.parametrize(("name", "keyword", "value"), [*WITH_OWN, ("adaptive_kl", "head", 0.6)])
def test_it_gives_the_number_derived_by_hand_for_its_own_keyword(name, keyword, value):
    result = LOGITS[name](STUDENT, TEACHER, **{keyword: value})
    assert result.item() == pytest.approx(GOLDEN_OWN[name], rel=1e-6)


# Temperature, own keywords, vocabularies


def test_temperature_divides_the_logits_of_both_and_scales_nothing():
    for name in LOGITS:
        twice = LOGITS[name](2 * STUDENT, 2 * TEACHER, temperature=2.0)
        assert twice.item() == pytest.approx(GOLDEN[name], rel=1e-6), name


def test_a_temperature_that_is_not_positive_is_refused():
    for name in LOGITS:
        for temperature in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="temperature must be above 0"):
                LOGITS[name](STUDENT, TEACHER, temperature=temperature)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("jsd", {"beta": -0.1}),
        ("jsd", {"beta": 1.1}),
        ("skew_forward_kl", {"alpha": -0.1}),
        ("skew_forward_kl", {"alpha": 1.0}),
        ("skew_reverse_kl", {"alpha": -0.1}),
        ("skew_reverse_kl", {"alpha": 1.0}),
        ("adaptive_kl", {"head": 0.0}),
        ("adaptive_kl", {"head": 1.0}),
    ],
)
def test_an_own_keyword_out_of_range_is_refused(name, own):
    with pytest.raises(ValueError, match=next(iter(own))):
        LOGITS[name](STUDENT, TEACHER, **own)


@pytest.mark.parametrize(
    ("name", "own", "limit"),
    [
        ("jsd", {"beta": 0.0}, "forward_kl"),
        ("jsd", {"beta": 1.0}, "reverse_kl"),
        ("skew_forward_kl", {"alpha": 0.0}, "forward_kl"),
        ("skew_reverse_kl", {"alpha": 0.0}, "reverse_kl"),
    ],
)
def test_the_ends_of_the_range_are_the_plain_divergences(name, own, limit):
    student, teacher = noise(6, 5), noise(6, 5, seed=1)
    assert torch.equal(LOGITS[name](student, teacher, **own), LOGITS[limit](student, teacher))


@pytest.mark.parametrize(("end", "share"), [("forward_kl", 1e-6), ("reverse_kl", 1 - 1e-6)])
def test_jsd_divided_by_its_vanishing_share_tends_to_the_end_of_the_range(end, share):
    student, teacher = noise(6, 5, dtype=torch.float64), noise(6, 5, seed=1, dtype=torch.float64)
    limit = LOGITS["jsd"](student, teacher, beta=share) / min(share, 1 - share)
    assert torch.allclose(limit, LOGITS[end](student, teacher), rtol=1e-4)


@pytest.mark.parametrize(("name", "keyword", "_value"), WITH_OWN)
def test_any_share_is_finite_at_extremes(name, keyword, _value):
    for share in (1e-12, 1e-3, 0.999):
        student = EXTREME.clone().requires_grad_()
        value = LOGITS[name](student, EXTREME.roll(1, 0), **{keyword: share})
        value.sum().backward()
        assert value.isfinite().all() and student.grad.isfinite().all()


def test_padded_vocabularies_are_cut_to_the_shared_length():
    for name in LOGITS:
        student, teacher = noise(4, 7), noise(4, 5, seed=1)
        assert torch.equal(LOGITS[name](student, teacher), LOGITS[name](student[:, :5].clone(), teacher)), name
        assert torch.equal(LOGITS[name](teacher, student), LOGITS[name](teacher, student[:, :5].clone())), name


def test_a_class_forbidden_on_both_sides_is_as_if_it_were_not_there():
    for name in LOGITS:
        student, teacher = (torch.cat([noise(4, 5, seed=seed), torch.full((4, 1), -torch.inf)], -1) for seed in (0, 1))
        student.requires_grad_()
        value = LOGITS[name](student, teacher)
        value.sum().backward()
        share = 5 / 6 if name == "logit_mse" else 1  # the only one that is a mean over the classes
        assert torch.allclose(value, share * LOGITS[name](student[:, :5], teacher[:, :5])), name
        assert student.grad.isfinite().all() and (student.grad[:, 5] == 0).all(), name


def test_rounding_below_zero_is_removed_without_cutting_the_gradient():
    # Many near-equal rows: where rounding goes below 0 the value is 0, while the gradient is still S - T.
    student = noise(200, 100).requires_grad_()
    teacher = student.detach() + 1e-5 * noise(200, 100, seed=1)
    LOGITS["forward_kl"](student, teacher).sum().backward()
    expected = student.detach().double().softmax(-1) - teacher.double().softmax(-1)
    assert (student.grad.double() - expected).abs().max() < 1e-7


def test_soft_cross_entropy_is_forward_kl_plus_the_entropy_of_the_teacher():
    student, teacher = noise(6, 5), noise(6, 5, seed=1)
    entropy = torch.distributions.Categorical(logits=teacher).entropy()
    total = LOGITS["forward_kl"](student, teacher) + entropy
    assert torch.allclose(LOGITS["soft_cross_entropy"](student, teacher), total)


def test_align_keeps_float64_and_widens_the_rest():
    half, double = noise(2, 3, dtype=torch.float16), noise(2, 3, dtype=torch.float64)
    assert [side.dtype for side in align(half, double)] == [torch.float32, torch.float64]


# A teacher of which only the most likely tokens are known

COARSE = sorted(set(LOGITS) - {"soft_cross_entropy"})


def test_top_k_compares_the_tokens_and_one_tail():
    for name in COARSE:
        probabilities = [
            torch.tensor(rows, dtype=torch.float64) for rows in ([0.1, 0.2, 0.3, 0.4], [0.5, 0.1, 0.11, 0.29])
        ]
        student, teacher = (each.log() for each in probabilities)
        # tokens 0 and 3 of the teacher, and what is left: of the student 0.1, 0.4 and 0.5
        expected = (
            torch.tensor([0.1, 0.4, 0.5], dtype=torch.float64).log(),
            torch.tensor([0.5, 0.29, 0.21], dtype=torch.float64).log(),
        )
        for temperature in (1.0, 2.0):
            found = LOGITS[name](student + 3, TopK.of(teacher - 2, 2), temperature=temperature).item()
            assert found == pytest.approx(LOGITS[name](*expected, temperature=temperature).item(), rel=1e-9), name


def test_top_k_is_exactly_zero_at_equality_and_finite_at_extremes():
    for name in COARSE:
        same = noise(7, 33) * 5
        assert (LOGITS[name](same, TopK.of(same, 8)) == 0).all(), name
        student = torch.cat([EXTREME, EXTREME], -1).requires_grad_()
        value = LOGITS[name](student, TopK.of(torch.cat([EXTREME.roll(1, 0), EXTREME], -1), 2))
        value.sum().backward()
        assert value.isfinite().all() and student.grad.isfinite().all(), name


def test_the_gradient_against_top_k_is_the_derivative():
    for name in COARSE:
        student, teacher = noise(3, 6, dtype=torch.float64).requires_grad_(), noise(3, 6, seed=1, dtype=torch.float64)
        loss = partial(LOGITS[name], teacher_logits=TopK.of(teacher, 2))
        assert torch.autograd.gradcheck(loss, (student,)), name


def test_what_is_not_told_apart_is_not_counted():
    for name in ["forward_kl", "reverse_kl", "jsd", "total_variation"]:
        student, teacher = noise(50, 20, seed=2, dtype=torch.float64), noise(50, 20, seed=3, dtype=torch.float64)
        values = [LOGITS[name](student, TopK.of(teacher, k)) for k in (2, 5, 19)] + [LOGITS[name](student, teacher)]
        for fewer, more in pairwise(values):
            assert (fewer <= more + 1e-12).all(), name

"""What is particular to hidden states; the battery for every loss is in test_logits.py."""

import pytest
import torch

from distill.losses import HIDDEN

# s = (3, 4) of length 5 and t = (0, 2) of length 2; unit vectors (3/5, 4/5) and (0, 1)
STUDENT, TEACHER = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
GOLDEN = {
    "mse": 13 / 2,  # (3² + 2²) / 2
    "cosine": 1 / 5,  # 1 - (3 * 0 + 4 * 2) / (5 * 2)
    "normalized_mse": 1 / 5,  # ((3/5)² + (1/5)²) / 2
    "relative_mse": 13 / 4,  # (3² + 2²) / 2²
}

every_distance = pytest.mark.parametrize("name", HIDDEN)


@every_distance
def test_it_gives_the_number_derived_by_hand(name):
    assert HIDDEN[name](STUDENT, TEACHER).item() == pytest.approx(GOLDEN[name], rel=1e-6)


@every_distance
def test_zero_vectors_give_finite_values_and_gradients(name):
    sizes = (0.0, 1e-30, 1e-8)
    for student, teacher in [pair for size in sizes for pair in [(size, 1.0), (1.0, size), (size, size)]]:
        student = torch.full((2, 4), student, requires_grad=True)
        value = HIDDEN[name](student, torch.full((2, 4), teacher))
        value.sum().backward()
        assert value.isfinite().all() and student.grad.abs().max() <= 4


def test_cosine_of_a_zero_vector_is_a_half_away_from_any_direction():
    assert HIDDEN["cosine"](torch.zeros(2), TEACHER) == 0.5
    assert HIDDEN["cosine"](torch.zeros(2), torch.zeros(2)) == 0


@pytest.mark.parametrize(("factor", "expected"), [(2.5, 0.0), (-1.0, 2.0)])
def test_cosine_sees_the_direction_and_not_the_size(factor, expected):
    assert HIDDEN["cosine"](factor * STUDENT, STUDENT).item() == pytest.approx(expected, abs=1e-12)


def test_relative_mse_does_not_change_when_both_sides_grow():
    assert HIDDEN["relative_mse"](8 * STUDENT, 8 * TEACHER) == HIDDEN["relative_mse"](STUDENT, TEACHER)


@every_distance
def test_another_width_is_refused_and_the_way_out_is_named(name):
    with pytest.raises(ValueError, match="project the student"):
        HIDDEN[name](torch.ones(3, 4), torch.ones(3, 1))

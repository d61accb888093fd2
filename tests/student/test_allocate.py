from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import InputError
from distill.recipe.schema import Mlp
from distill.student.allocate import layer_widths


def widths(scores, keep, whole=None, influence=None, **mlp):
    own = [torch.as_tensor(each, dtype=torch.float64) for each in scores]
    spec = Mlp(**{"multiple_of": 1, **mlp})
    return layer_widths(own, spec, keep, influence, whole or [False] * len(own))


@given(st.integers(1, 300), st.floats(0.01, 1.0), st.sampled_from([1, 8, 64]))
@settings(max_examples=200)
def test_widths_are_never_above_what_was_asked(full, share, multiple):
    try:
        got = widths([[0.0] * full] * 2, share, multiple_of=multiple)
    except InputError:
        assert int(share * full + 1e-9) < multiple
        return
    assert got[0] == got[1] <= share * full + 1e-6
    assert got[0] == full or got[0] % multiple == 0


def test_shares_that_floating_point_rounds_down_are_not_a_neuron_short():
    assert widths([[0.0] * 10], 0.7) == [7]
    assert int(0.29 * 100) == 28 and widths([[0.0] * 100], 0.29) == [29]


def test_a_list_gives_each_layer_its_own():
    assert widths([[0.0] * 48] * 3, [0.5, 16, 1.0], multiple_of=8) == [24, 16, 48]
    with pytest.raises(InputError, match="2 widths for 3 kept layers"):
        widths([[0.0] * 48] * 3, [0.5, 16])


def test_threshold_counts_scores_above_a_multiple_of_the_mean():
    scores = [[0.0, 1.0, 2.0, 5.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 4.0]]  # means 2, 1 and 1
    assert widths(scores, 1.0, allocate="threshold", allocate_params={"threshold": 1.0}) == [2, 4, 1]
    assert widths(scores, 1.0, allocate="threshold", allocate_params={"threshold": 9.0}, floor=2) == [2, 2, 2]


def test_mass_keeps_the_fewest_that_hold_it():
    scores = [[5.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]]  # sums 5, 7, 9, 10 and 1, 2, 3, 4
    assert widths(scores, 1.0, allocate="threshold", allocate_params={"mass": 0.7}) == [2, 3]
    assert widths(scores, 1.0, allocate="threshold", allocate_params={"mass": 1.0}) == [4, 4]


def test_one_ranking_over_standardised_scores():
    # Standardised, they are (-1, -1, 1, 1) and (-1.73, 0.58, 0.58, 0.58): after the two ones come the three equal ones.
    assert widths([[0.0, 0.0, 10.0, 10.0], [0.0, 4.0, 4.0, 4.0]], 0.5, allocate="global") == [2, 2]
    assert widths([[0.0, 0.0, 10.0, 10.0], [0.0, 4.0, 4.0, 4.0]], 0.625, allocate="global") == [2, 3]


def test_equal_scores_share_in_proportion():
    assert widths([[1.0] * 40, [3.0] * 80], 0.5, allocate="global") == [20, 40]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.data())
def test_one_layer_alone_is_local(scores, data):
    keep = data.draw(st.integers(1, len(scores)))
    assert widths([scores], keep, allocate="global") == widths([scores], keep)


@given(st.integers(0, 9999), st.sampled_from(["global", "sensitivity"]), st.sampled_from([1, 4, 16]), st.data())
@settings(max_examples=200, deadline=None)
def test_a_shared_budget_is_met_within_one_multiple(seed, allocate, multiple, data):
    generator = torch.Generator().manual_seed(seed)
    sizes = data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=5))
    full = [16 * size for size in sizes]
    scores = [torch.rand(size, generator=generator) ** 3 for size in full]
    share, influence = data.draw(st.floats(0.05, 1.0)), torch.rand(len(full), generator=generator).tolist()
    floor = data.draw(st.sampled_from([None, 0.1, 4]))
    try:
        got = widths(scores, share, influence=influence, allocate=allocate, multiple_of=multiple, floor=floor)
    except InputError:
        assert floor is not None or share * sum(full) < multiple * len(full)
        return
    budget = share * sum(full)
    assert budget + 1e-6 >= sum(got) > budget - multiple - 1e-6
    assert all(0 < own <= size and own % multiple == 0 for own, size in zip(got, full, strict=True))


def test_influential_layers_keep_more_and_the_mean_is_the_budget():
    scores, influence = [[0.0] * 100] * 2, [0.1, 0.3]
    assert widths(scores, 0.4, influence=influence, allocate="sensitivity") == [30, 50]  # 40 * (1 -+ 0.5 * 0.5)
    full = {"allocate": "sensitivity", "allocate_params": {"strength": 1.0}}
    assert widths(scores, 0.5, influence=influence, **full) == [25, 75]
    assert widths(scores, 0.8, influence=influence, **full) == [60, 100]  # 40 and 120, and no layer has 120
    even = {"allocate": "sensitivity", "allocate_params": {"strength": 0.0}}
    assert widths(scores, 0.5, influence=influence, **even) == [50, 50]


def test_protected_layers_are_whole_and_not_part_of_the_budget():
    for allocate in ("uniform", "global"):
        got = widths([[1.0] * 40] * 3, 0.5, whole=[False, True, False], allocate=allocate)
        assert got == [20, 40, 20]


@pytest.mark.parametrize(
    ("keep", "mlp", "words"),
    [
        (49, {}, "the teacher's MLP has 48"),
        (7, {"multiple_of": 8}, "rounds down to 0 with multiple_of 8, below the floor of 8"),
        (0.25, {"floor": 0.5}, "below the floor of 24"),
        (0.25, {"floor": 20, "allocate": "global"}, "24 neurons over 2 layers are fewer than the 40"),
        (4, {"multiple_of": 16, "allocate": "global"}, "8 neurons over 2 layers are fewer than the 32"),
        (0.5, {"allocate": "sensitivity"}, "needs calibration"),
        (0.5, {"allocate": "sensitivity", "allocate_params": {"strength": 2.0}}, "between 0 and 1"),
        (1.0, {"allocate": "threshold", "allocate_params": {"mass": 2.0}}, "above 0 and at most 1"),
        (0.5, {"allocate": "builtins:print"}, "returned None, not a number of neurons for each of the 2 layers that"),
    ],
)
def test_an_impossible_request_is_one_clear_error(keep, mlp, words):
    with pytest.raises(InputError, match=words):
        widths([[0.0] * 48] * 2, keep, influence=[0.1, 0.2] if "strength" in str(mlp) else None, **mlp)


def test_a_threshold_refuses_scores_that_can_be_negative():
    with pytest.raises(InputError, match="not negative"):
        widths([[-1.0, 1.0]], 1.0, allocate="threshold", allocate_params={"mass": 0.5})

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_inputs, tiny_model

from distill.errors import InputError
from distill.models.family import layout_of
from distill.models.mlp import mlps_of
from distill.recipe.names import READS
from distill.student import Statistics, calibrate
from distill.student.calibration.collect import StatisticsRequest
from distill.student.calibration.column_sums import WIDENED_AT_ONCE, column_products, column_sums
from distill.student.scores import SCORES, MlpLayer, magnitude, output_change

DATA_SCORES = [name for name in SCORES if name not in ("magnitude", "random")]
# Two neurons, D = 2: w_0 = (3, 4) of norm 5, w_1 = (0, 2) of norm 2.
LAYER = MlpLayer(0, [torch.tensor([[1.0, 2.0], [2.0, 0.0]])], torch.tensor([[3.0, 0.0], [4.0, 2.0]]))
# Four positions in two sequences: x_0 = 1, 1 | -1, 3 and x_1 = 2, 0 | 0, 0.
FIGURES = {
    "tokens": 4.0, "sum": [4.0, 2.0], "abs": [6.0, 2.0], "square": [12.0, 4.0], "sequence_square": [5.0, 1.0],
    "gram": [[12.0, 2.0], [2.0, 4.0]], "task_abs": [6.0, 2.0], "task_square": [20.0, 4.0], "kl_square": [8.0, 2.0],
}  # fmt: skip
STATISTICS = Statistics(
    {f"main.0.{name}": torch.tensor(value, dtype=torch.float64) for name, value in FIGURES.items()}
    | {"main.task_examples": torch.tensor(2.0), "main.kl_examples": torch.tensor(4.0)}
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("activation", [1.5, 0.5]),
        ("activation_l2", [math.sqrt(1**2 + 2**2), 1.0]),
        ("output_norm", [math.sqrt(3) * 5, 1 * 2]),
        ("wanda", [math.sqrt(3) * (3 + 4) / 2, 1 * 2 / 2]),
        ("magnitude", [math.sqrt(1 + 4 + 25), math.sqrt(4 + 4)]),
        ("taylor", [3.0, 1.0]),
        ("fisher", [10.0, 2.0]),
        ("taylor_kl", [1.0, 0.25]),
        ("fluctuation", [(3 - 1) * 25, (1 - 0.25) * 4]),
        ("output_change", [1.0, 0.0]),
    ],
)
def test_scores_are_those_derived_by_hand(name, expected):
    torch.testing.assert_close(SCORES[name](LAYER, STATISTICS).double(), torch.tensor(expected, dtype=torch.float64))


def test_magnitude_in_the_1_norm():
    assert magnitude(LAYER, None, norm=1).tolist() == [3 + 7, 2 + 2]
    with pytest.raises(InputError, match="1 or 2"):
        magnitude(LAYER, None, norm=3)


def greedy(gram, weight):
    """Ranks by trying every removal from scratch."""
    products, size = gram * (weight.T @ weight), len(gram)
    ranks, gone = [0.0] * size, []
    for rank in range(size):
        cost = {j: float(products[[*gone, j]][:, [*gone, j]].sum()) for j in range(size) if j not in gone}
        least = min(cost.values())
        chosen = max(j for j, own in cost.items() if own <= least + 1e-9)
        gone.append(chosen)
        ranks[chosen] = rank
    return ranks


@given(st.integers(1, 7), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_output_change_is_greedy_removal(size, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(9, size, generator=generator).double(), torch.randn(3, size, generator=generator)
    sums = {"main.0.tokens": torch.tensor(9.0), "main.0.gram": x.T @ x}
    got = output_change(MlpLayer(0, [], weight), Statistics(sums))
    assert got.tolist() == greedy(x.T @ x / 9, weight.double())


def test_neurons_that_undo_each_other_are_removed_together():
    # x is 1 everywhere. Without neuron 2 the output is 1 off, and removing neuron 0 as well puts it right.
    sums = {"main.0.tokens": torch.tensor(1.0), "main.0.gram": torch.ones(3, 3).double()}
    assert output_change(MlpLayer(0, [], torch.tensor([[1.0, 1.2, -1.0]])), Statistics(sums)).tolist() == [1, 2, 0]


def test_every_score_ranks_the_neurons_of_every_family(form):
    model = tiny_model(form)
    statistics = calibrate(model, [tiny_inputs(model)], StatisticsRequest(gram=True, gradients=True))
    for side in layout_of(model).sides:
        for index, mlp in enumerate(mlps_of(model, side)):
            layer = MlpLayer(index, [w.detach() for w in mlp.weights_in], mlp.weight_out.detach(), side)
            for name, score in SCORES.items():
                values = score(layer, statistics.of(side))
                assert values.shape == (*mlp.weight_out.shape[:-2], mlp.width), name
                assert torch.isfinite(values).all() and (values >= 0).all(), name


def test_scores_of_permuted_neurons_are_permuted():
    model, order = tiny_model("llama"), torch.randperm(48, generator=torch.Generator().manual_seed(0))
    wanted = StatisticsRequest(gram=True, gradients=True)
    before = calibrate(model, [tiny_inputs(model)], wanted)
    mlp = mlps_of(model)[1]
    scores = {name: SCORES[name](MlpLayer(1, mlp.weights_in, mlp.weight_out), before) for name in DATA_SCORES}
    with torch.no_grad():
        for weight in mlp.weights_in:
            weight.copy_(weight[order].clone())
        mlp.weight_out.copy_(mlp.weight_out[:, order].clone())
    after = calibrate(model, [tiny_inputs(model)], wanted)
    for name, values in scores.items():
        again = SCORES[name](MlpLayer(1, mlp.weights_in, mlp.weight_out), after)
        torch.testing.assert_close(again, values[order], rtol=1e-3, atol=1e-6, msg=name)


def test_scores_that_read_statistics_say_so_and_name_what_was_not_collected():
    plain = Statistics({name: total for name, total in STATISTICS.sums.items() if not re.search("gram|task|kl", name)})
    for name, score in SCORES.items():
        if name not in DATA_SCORES:
            assert score(LAYER, None).shape == (2,)
            continue
        with pytest.raises(InputError, match="needs calibration data"):
            score(LAYER, None)
        if name in READS:
            with pytest.raises(InputError, match=rf"student\.calibration\.{READS[name]}: true"):
                score(LAYER, plain)
        else:
            assert score(LAYER, plain).shape == (2,)


@pytest.mark.parametrize("shape", list(itertools.product((1, 7), (1, 5))))
def test_sums_in_slices_are_sums(shape, monkeypatch):
    weight = torch.randn(2, *shape)
    monkeypatch.setattr("distill.student.calibration.column_sums.WIDENED_AT_ONCE", 3)
    torch.testing.assert_close(column_sums(torch.square, weight), weight.double().square().sum(-2))
    torch.testing.assert_close(column_sums(torch.mul, weight.mT, weight.mT), weight.mT.double().square().sum(-2))
    torch.testing.assert_close(column_products(weight[0]), weight[0].double().T @ weight[0].double())


def test_half_precision_weights_are_widened_a_slice_at_a_time():
    widened = []

    def note(part):
        widened.append(part.numel())
        return part.abs()

    column_sums(note, torch.zeros(3000, 4000, dtype=torch.bfloat16))
    assert max(widened) <= WIDENED_AT_ONCE and sum(widened) == 12_000_000

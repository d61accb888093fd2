"""Choosing masks, counting zeros: numbers by hand, exact counts, every layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import LAYERS, WIDTH, tiny_batch, tiny_model

from distill.errors import InputError
from distill.models.mlp import mlps_of
from distill.recipe.schema import Mask
from distill.student.masks.masks import Masks, choose, lowest, progress
from distill.student.masks.sparsity import tabulate_sparsity


def mlp_weights(model):
    return [[*mlp.weights_in, mlp.weight_out] for mlp in mlps_of(model)]


def masked(family="bert", model=None, **spec):
    """A model masked before the first step, and its masks."""
    model = model or tiny_model(family)
    masks = Masks(model, Mask(**spec), 10)
    masks.after_step(0)
    return model, masks


def test_the_cubic_schedule_by_hand():
    spec = Mask(sparsity=0.8, schedule="cubic", begin=0.1, end=0.5, every=10)
    got = {step: progress(spec, step, 100) for step in range(101)}
    # t = 0, 1/4, 1/2, 3/4, 1 of the way from step 10 to step 50: 1 - (1 - t)^3
    expected = {10: 0.0, 20: 1 - 27 / 64, 30: 1 - 1 / 8, 40: 1 - 1 / 64, 50: 1.0}
    assert {step: share for step, share in got.items() if share is not None} == pytest.approx(expected)


def test_the_last_choice_is_at_the_end_even_between_two_due_steps():
    spec = Mask(sparsity=0.5, schedule="cubic", begin=0.0, end=0.5, every=20)
    assert [step for step in range(101) if progress(spec, step, 100) is not None] == [0, 20, 40, 50]
    assert progress(spec, 50, 100) == 1.0


def test_one_shot_is_once_at_begin():
    spec = Mask(sparsity=0.5, begin=0.3)
    assert [step for step in range(11) if progress(spec, step, 10) is not None] == [3] and progress(spec, 3, 10) == 1.0


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_the_lowest_are_exactly_so_many_and_ties_go_to_the_lower_index(values, data):
    count = data.draw(st.integers(0, len(values)))
    expected = sorted(range(len(values)), key=lambda i: (values[i], i))[:count]
    assert lowest(torch.tensor(values).float(), count).nonzero().flatten().tolist() == sorted(expected)


@given(st.integers(1, 60), st.floats(0.01, 0.99), st.data())
def test_a_larger_share_only_adds_to_what_is_masked(size, amount, data):
    scores, spec = [torch.rand(size), torch.rand(2, size)], Mask(sparsity=amount)
    first, second = sorted(data.draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    none = [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    few = choose(scores, none, spec, first)
    many = choose([torch.rand(score.shape) for score in scores], few, spec, second)  # whatever the scores say now
    assert sum(int(mask.sum()) for mask in many) == int(amount * second * 3 * size + 1e-9)
    assert all(bool((new | ~old).all()) for old, new in zip(few, many, strict=True))


def test_the_threshold_by_hand():
    # Mean of all eight scores: 36 / 8 = 4.5; half of it: 2.25, so 1 and 2 go. Half of the way: 1.125, so 1 goes.
    scores = [torch.tensor([1.0, 5.0, 3.0, 7.0]), torch.tensor([[8.0, 2.0], [4.0, 6.0]])]
    none = [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    whole = choose(scores, none, Mask(threshold=0.5), 1.0)
    assert whole[0].tolist() == [True, False, False, False] and whole[1].tolist() == [[False, True], [False, False]]
    half = choose(scores, none, Mask(threshold=0.5), 0.5)
    assert half[0].tolist() == [True, False, False, False] and not half[1].any()


def test_the_smallest_weights_of_each_layer_are_masked_and_nothing_else_changes(form):
    before, (model, masks) = tiny_model(form), masked(form, sparsity=0.3)
    for old, new in zip(mlp_weights(before), mlp_weights(model), strict=True):
        old_flat, new_flat = (torch.cat([weight.flatten() for weight in own]) for own in (old, new))
        gone = new_flat == 0
        assert int(gone.sum()) == int(0.3 * len(old_flat) + 1e-9)
        assert old_flat[gone].abs().max() <= old_flat[~gone].abs().min()
        assert torch.equal(new_flat[~gone], old_flat[~gone])
    named = dict(before.named_parameters())
    assert all(torch.equal(p, named[name]) for name, p in model.named_parameters() if name not in masks.masks)
    assert masks.figures()["sparsity"] == pytest.approx(0.3, abs=1e-3)


def test_whole_neurons_go_with_rows_biases_and_column(form):
    before, (model, _) = tiny_model(form), masked(form, per="neuron", sparsity=0.25)
    for old, new in zip(mlps_of(before), mlps_of(model), strict=True):
        norms = torch.stack([w.square().sum(-1) for w in old.weights_in]).sum(0) + old.weight_out.square().sum(-2)
        expected = norms.argsort(dim=-1)[..., : WIDTH // 4].sort(dim=-1).values
        parts = [weight.abs().sum(-1) for weight in new.weights_in] + [bias.abs() for bias in new.biases_in]
        for values in (*parts, new.weight_out.abs().sum(-2)):
            assert (values == 0).sum(-1).unique().tolist() == [WIDTH // 4]
            found = (values == 0).nonzero()[:, -1].view(expected.shape)
            assert torch.equal(found, expected)


def test_a_threshold_on_neurons_is_relative_to_the_mean_norm_of_the_layer():
    model = tiny_model("llama")
    mlp = mlps_of(model)[0]
    with torch.no_grad():
        for weight in (*mlp.weights_in, mlp.weight_out):
            weight.zero_()
        mlp.weight_out[0] = torch.arange(1.0, WIDTH + 1)  # norms 1 ... 48, mean 24.5
    masked(model=model, per="neuron", threshold=0.5)
    assert (mlp.weight_out[0] == 0).nonzero().flatten().tolist() == list(range(12))  # 1 ... 12 are below 12.25


def test_random_masks_follow_the_seed():
    def zero_places(**params):
        model, _ = masked("llama", sparsity=0.5, score="random", params=params)
        return torch.cat([weight.flatten() == 0 for own in mlp_weights(model) for weight in own])

    first = zero_places(seed=1)
    assert torch.equal(first, zero_places(seed=1)) and not torch.equal(first, zero_places(seed=2))
    assert zero_places().sum() == first.sum() == len(first) // 2


def test_only_chosen_matrices_and_layers_are_masked():
    model, masks = masked("llama", sparsity=0.5, only=["*.layers.[12].mlp.down_proj.*"])
    assert set(masks.masks) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)}
    rows = [row for row in tabulate_sparsity(model)["matrices"] if row["zeros"]]
    assert [(row["layer"], row["name"]) for row in rows] == [(i, "mlp.down_proj.weight") for i in (1, 2)]
    assert all(row["share"] == 0.5 for row in rows)


def test_frozen_parameters_are_never_chosen():
    model = tiny_model("bert")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("intermediate" not in name)
    _, masks = masked(model=model, sparsity=0.5)
    assert masks.masks and not any("intermediate" in name for name in masks.masks)


def test_a_pattern_or_a_freeze_that_leaves_nothing_is_refused():
    with pytest.raises(InputError, match=r"student\.mask\.only: '\*\.mpl\.\*' matches no weight"):
        Masks(tiny_model("llama"), Mask(sparsity=0.5, only=["*.mpl.*"]), 10)
    with pytest.raises(InputError, match="frozen"):
        Masks(tiny_model("llama").requires_grad_(False), Mask(sparsity=0.5), 10)


def test_a_score_of_ones_own_ranks_weights(tmp_path, monkeypatch):
    (tmp_path / "my_masks.py").write_text(
        "def largest(weights, layer, *, power: float = 1.0):\n    return [1 / w.abs() ** power for w in weights]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before, (model, _) = tiny_model("gpt2"), masked("gpt2", sparsity=0.5, score="my_masks:largest", params={"power": 2})
    for old, new in zip(mlp_weights(before), mlp_weights(model), strict=True):
        old_flat, new_flat = (torch.cat([weight.flatten() for weight in own]) for own in (old, new))
        assert old_flat[new_flat == 0].abs().min() >= old_flat[new_flat != 0].abs().max()
    with pytest.raises(InputError, match="no parameter 'powr'"):
        Masks(model, Mask(sparsity=0.5, score="my_masks:largest", params={"powr": 2}), 10)


def test_zeros_are_counted_by_hand():
    model = tiny_model("llama")
    mlp = mlps_of(model)[1]
    with torch.no_grad():
        mlp.weight_out[:, :3] = 0  # 3 neurons of 48, 32 weights each
        mlp.weights_in[1][5, :8] = 0  # 8 of the 32 weights of one neuron
    table = tabulate_sparsity(model)
    rows = {(row["layer"], row["name"]): row for row in table["matrices"]}
    assert list(rows) == [(i, f"mlp.{n}_proj.weight") for i in range(LAYERS) for n in ("gate", "up", "down")]
    down, up = rows[1, "mlp.down_proj.weight"], rows[1, "mlp.up_proj.weight"]
    assert [down[key] for key in ("zeros", "zero_neurons", "neurons", "share")] == [96, 3, 48, 1 / 16]
    assert (up["zeros"], up["zero_neurons"], up["weights"], up["side"]) == (8, 0, 48 * 32, "main")
    assert up["norm"] == pytest.approx(mlp.weights_in[1].norm().item(), rel=1e-6)
    assert table["widths"] == [48] * LAYERS and table["zeros"] == (96 + 8) / (LAYERS * 3 * 48 * 32)


def test_masks_continue_from_their_tensors():
    _, masks = masked("llama", sparsity=0.5)
    other = tiny_model("llama", seed=9)
    again = Masks(other, Mask(sparsity=0.5), 10)
    again.load(masks.tensors())
    again.after_step(7)
    for name, parameter in other.named_parameters():
        if name in masks.masks:
            assert torch.equal(parameter == 0, masks.masks[name])
    assert torch.isfinite(other(**tiny_batch()).logits).all()

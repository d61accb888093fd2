from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_batch, tiny_model

from distill.errors import InputError
from distill.recipe.names import PROTECTING
from distill.recipe.schema import Layers
from distill.student import Statistics, calibrate
from distill.student.layers import LAYER_POLICIES, choose_layers, even, even_rounded, every


def statistics(**figures):
    sums = {f"main.{name}": torch.tensor(own, dtype=torch.float64) for name, own in figures.items()}
    return Statistics({"main.tokens": torch.tensor(1.0), "main.sequences": torch.tensor(1.0), **sums})


@pytest.mark.parametrize(("layers", "keep", "expected"), [(12, 6, [0, 2, 4, 6, 8, 11]), (6, 3, [0, 2, 5]), (4, 1, [3])])
def test_even_is_the_distil_whisper_rule(layers, keep, expected):
    assert even(layers, keep, None) == expected


@pytest.mark.parametrize(
    ("layers", "keep", "expected"), [(12, 6, [0, 2, 4, 7, 9, 11]), (12, 3, [0, 6, 11]), (6, 3, [0, 3, 5]), (4, 1, [0])]
)
def test_even_rounded_is_the_distilbert_rule(layers, keep, expected):
    assert even_rounded(layers, keep, None) == expected


def test_every_is_the_last_layer_of_each_group():
    assert every(6, 3, None) == [1, 3, 5]


@given(st.integers(1, 40), st.data())
def test_every_policy_gives_ascending_layers_in_range_and_keeps_the_protected(layers, data):
    keep = data.draw(st.integers(1, layers))
    name = data.draw(st.sampled_from([name for name in LAYER_POLICIES if name not in ("every", "greedy_loss")]))
    values = data.draw(st.lists(st.floats(0, 1), min_size=layers + 1, max_size=layers + 1))
    own = statistics(cosine=values[:layers], without=values[:layers], without_positions=1.0)
    own.sums["main.angles"] = torch.rand(layers + 1, layers + 1, generator=torch.Generator().manual_seed(layers))
    first, last = data.draw(st.integers(0, keep)), data.draw(st.integers(0, keep))
    protected = {*range(first), *range(layers - last, layers)}
    if name in PROTECTING and len(protected) <= keep:
        chosen = LAYER_POLICIES[name](layers, keep, own, protected=protected)
        assert protected <= set(chosen)
    else:
        chosen = LAYER_POLICIES[name](layers, keep, own)
    assert sorted(set(chosen)) == chosen and len(chosen) == keep and chosen[0] >= 0 and chosen[-1] < layers


def test_block_influence_keeps_what_changes_most_and_ties_keep_the_lower():
    own = statistics(cosine=[0.5, 0.9, 0.9, 0.1])
    assert LAYER_POLICIES["block_influence"](4, 3, own) == [0, 1, 3]
    assert LAYER_POLICIES["block_influence"](4, 2, own, protected={2}) == [2, 3]


def test_loss_drop_removes_what_is_missed_least():
    own = statistics(without=[9.0, 2.0, 5.0, 3.0], without_positions=2.0)
    assert LAYER_POLICIES["loss_drop"](4, 2, own) == [0, 2]
    assert LAYER_POLICIES["loss_drop"](4, 2, own, protected={1}) == [0, 1]


def test_angular_drops_the_block_whose_ends_are_closest():
    distances = torch.full((5, 5), 0.5)
    distances[1, 3] = 0.1  # layers 1 and 2
    distances[2, 4] = 0.2  # layers 2 and 3
    own = statistics()
    own.sums["main.angles"] = distances
    assert LAYER_POLICIES["angular"](4, 2, own) == [0, 3]
    assert LAYER_POLICIES["angular"](4, 2, own, protected={1}) == [0, 1]
    with pytest.raises(InputError, match="free of protected"):
        LAYER_POLICIES["angular"](4, 2, own, protected={1, 2})


def test_greedy_loss_needs_removals_made_for_this_request():
    own = Statistics({"main.removals": torch.tensor([2, 0])})
    assert LAYER_POLICIES["greedy_loss"](4, 2, own) == [1, 3]
    assert LAYER_POLICIES["greedy_loss"](4, 3, own) == [0, 1, 3]
    for keep, protected in ((1, set()), (2, {0})):
        with pytest.raises(InputError, match="calibrate again"):
            LAYER_POLICIES["greedy_loss"](4, keep, own, protected=protected)


def test_policies_that_read_statistics_say_so_without_them():
    for name, policy in LAYER_POLICIES.items():
        if name in PROTECTING and name != "random":
            with pytest.raises(InputError, match="needs calibration data"):
                policy(4, 2, None)
        else:
            assert len(policy(4, 2, None)) == 2


@pytest.mark.parametrize("chosen", [[0], [2, 1], [1, 1], [-1, 2], [1, 4], [0, 1, 2], None, (0, 1)])
def test_a_policy_of_ones_own_must_give_ascending_layers_of_the_teacher(chosen, tmp_path, monkeypatch):
    (tmp_path / "my_policy.py").write_text(f"def mine(layers, keep, statistics):\n    return {chosen}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_policy", raising=False)
    with pytest.raises(InputError, match=r"student\.layers\.choose: my_policy:mine returned .*not 2 ascending layers"):
        choose_layers(tiny_model("bert"), "main", Layers(keep=2, choose="my_policy:mine"), None)


def test_the_first_layer_of_modernbert_stays():
    model = tiny_model("modernbert")
    own = calibrate(model, [tiny_batch()])
    own.sums["main.cosine"][0] = own.tokens * 10  # the least influential by far
    assert 0 in choose_layers(model, "main", Layers(keep=2, choose="block_influence"), own)
    assert all(
        0 in choose_layers(model, "main", Layers(keep=1, choose="random", params={"seed": s}), None) for s in range(5)
    )
    for layers in (Layers(keep=[1, 2]), Layers(keep=2, choose="last")):
        with pytest.raises(InputError, match="layer 0 must be kept: the first layer of ModernBERT"):
            choose_layers(model, "main", layers, None)


def test_both_stacks_of_an_encoder_decoder_have_their_own_policy():
    model = tiny_model("bart")
    assert choose_layers(model, "encoder", None, None) == [0, 1, 2, 3]
    assert choose_layers(model, "encoder", Layers(keep=[0, 3]), None) == [0, 3]
    assert choose_layers(model, "main", Layers(keep=1, choose="last"), None) == [3]

"""Memory that is counted on fake tensors: what is alive, what values are followed, and sizes as people write them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from distill.errors import InputError
from distill.models.memory import make_fake, parse_size, tracing


def test_what_is_alive_counts_once_and_until_its_last_tensor_is_gone():
    with tracing() as trace:
        trace.fill("weights")
        first = torch.empty(1000)  # 4,000 bytes
        view = first[:10].view(2, 5)
        trace.fill("activations", "the pass")
        second = first.to(torch.bfloat16)  # 2,000
        assert trace.bytes == {"weights": 4000, "activations": 2000}
        del first
        assert trace.bytes["weights"] == 4000  # the view holds it
        del view
        assert trace.bytes["weights"] == 0
        third = second + 1
        del second, third
    peak = trace.peaks["the pass"]
    assert (peak.total, peak.parts, peak.moment) == (6000, {"weights": 4000, "activations": 2000}, "the pass")


def test_a_tensor_that_turns_out_to_be_something_else_is_moved():
    with tracing() as trace:
        trace.fill("activations")
        one, other = torch.empty(10), torch.empty(20)
        trace.move([one, one[:2]], "gradients")
        assert trace.bytes == {"activations": 80, "gradients": 40}
        del one, other
        assert not any(trace.bytes.values())


def test_what_is_made_of_real_tensors_alone_is_computed():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    with tracing():
        states = torch.empty(2, 3, 4)
        assert states[(mask == 1).nonzero(as_tuple=True)].shape == (3, 4)
        assert mask.sum().item() == 3
        assert isinstance(states * mask[..., None], FakeTensor)


def test_fake_parameters_are_as_those_they_replace_and_tied_ones_stay_tied():
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    with tracing() as trace:
        make_fake(model)
        assert model[1].weight is model[0].weight and not model[2].weight.requires_grad
        # 15 tied, 5 + 5 of the norm, its mean and variance, and one count of 8 bytes
        assert trace.bytes.total() == 4 * (15 + 5 + 5 + 5 + 5) + 8


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), (" 79.5 GiB", int(79.5 * 2**30)), ("512mb", 512 * 10**6)]
)
def test_sizes_are_read_with_their_unit(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["80", "GB", "0GB", "80 cards", "-1GB"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(InputError, match="80GB"):
        parse_size(text)

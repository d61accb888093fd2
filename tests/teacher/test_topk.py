"""The bytes of a cached teacher: what comes back, at which price, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import InputError
from distill.losses import LOGITS
from distill.models.topk import TopK
from distill.teacher.topk import LOWEST, STEPS, bytes_per_token, pack, unpack

VOCABULARIES = st.one_of(
    st.integers(1, 300), st.sampled_from([255, 256, 257, 49_152, 65_536, 65_537, 151_936, 262_144])
)


def round_trip(kept: TopK, vocabulary: int) -> TopK:
    return unpack(pack(kept, vocabulary), kept.ids.shape[-1], vocabulary)


def tolerance(values):
    """Half a step of the square root, and the rounding of fp32."""
    return (-LOWEST * values.abs()).sqrt() / STEPS + 1e-8 + values.abs() * 1e-6


@settings(max_examples=60, deadline=None)
@given(data=st.data(), vocabulary=VOCABULARIES, rows=st.integers(0, 3))
def test_ids_come_back_as_they_were_and_log_probabilities_within_the_documented_error(data, vocabulary, rows):
    k = data.draw(st.integers(1, min(vocabulary, 70)))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    scale = data.draw(st.sampled_from([0.0, 0.1, 3.0, 40.0]))
    ids = [torch.randperm(vocabulary, generator=draw)[:k] for _ in range(rows)]
    values = (torch.randn(rows, k + 1, generator=draw) * scale).log_softmax(-1)
    kept = TopK(torch.stack(ids) if ids else torch.empty(0, k, dtype=torch.int64), values)
    packed = pack(kept, vocabulary)
    assert packed.shape == (rows, bytes_per_token(k, vocabulary)) and packed.dtype == torch.uint8
    found = unpack(packed, k, vocabulary)
    assert torch.equal(found.ids, kept.ids)
    assert found.log_probabilities.dtype == torch.float32
    assert ((found.log_probabilities - values.clamp(min=LOWEST)).abs() <= tolerance(values)).all()
    assert torch.equal(pack(found, vocabulary), packed)  # a second time nothing is lost


def test_a_position_takes_as_many_bytes_as_its_bits():
    # 64 ids of 18 bits are 144 bytes, 65 values of 16 bits are 130
    assert bytes_per_token(64, 151_936) == bytes_per_token(64, 262_144) == 144 + 130
    assert bytes_per_token(64, 49_152) == 128 + 130
    # 3 ids of 3 bits need 2 bytes; one id of a vocabulary of one token a bit
    assert bytes_per_token(3, 7) == 2 + 8
    assert bytes_per_token(1, 1) == 1 + 4


def test_the_bytes_of_a_position_are_those_that_the_page_says():
    # 0x2_0103 and 0x1_0002: low bytes 3 and 2, second bytes 1 and 0, and of the two bits left first 2, then 1: 0b0110
    # l = 0, -128 and -32: roots 0, 1 and 1/2 of 65,534, low byte first
    kept = TopK(torch.tensor([[0x2_0103, 0x1_0002]]), torch.tensor([[0.0, -128.0, -32.0]]))
    expected = [3, 2, 1, 0, 0b0110, *(0, 0xFE, 0xFF), *(0, 0xFF, 0x7F)]
    assert pack(kept, 151_936).tolist() == [expected]


def test_forbidden_tokens_and_an_empty_tail_stay_minus_infinity():
    logits = torch.tensor([[2.0, -torch.inf, 1.0, -torch.inf]])
    found = round_trip(TopK.of(logits, 3), 4)
    assert found.log_probabilities[0, 2:].tolist() == [-torch.inf, -torch.inf]
    assert found.log_probabilities[0, :2].exp().sum().item() == pytest.approx(1, abs=1e-3)


def test_all_tokens_may_be_kept_and_then_the_tail_is_empty():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    found = round_trip(TopK.of(logits, 9), 9)
    assert (found.log_probabilities[:, -1] == -torch.inf).all()
    student = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(LOGITS["forward_kl"](student, found), LOGITS["forward_kl"](student, logits), atol=1e-3)


def test_logits_of_half_precision_and_ties_are_kept_in_full():
    for dtype in (torch.float16, torch.bfloat16):
        found = round_trip(TopK.of(torch.ones(2, 8, dtype=dtype), 4), 8)
        assert sorted(set(found.ids[0].tolist())) == sorted(found.ids[0].tolist())  # each once
        # each of 8 equal tokens has an eighth, the four that are not kept a half
        expected = torch.tensor([math.log(1 / 8)] * 4 + [math.log(1 / 2)])
        assert torch.allclose(found.log_probabilities[0], expected, atol=3e-4)


def test_the_distribution_that_comes_back_is_as_near_as_the_page_says():
    logits = torch.randn(400, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    kept = TopK.of(logits, 64)
    found = round_trip(kept, 1000).log_probabilities.double().log_softmax(-1)
    target = kept.log_probabilities
    lost = (target.exp() * (target - found)).sum(-1)
    entropy = -(target.exp() * target).sum(-1)
    assert (lost >= -1e-12).all() and (lost <= 1.5e-8 * entropy + 1e-12).all()


def test_what_cannot_be_kept_is_refused_before_it_is_cut_off():
    with pytest.raises(InputError, match="the 64 most likely tokens of a vocabulary of 50; write a k from 1 to 50"):
        bytes_per_token(64, 50)
    values = torch.tensor([[-0.1, -2.4]])
    for wrong in (-1, 50):
        with pytest.raises(ValueError, match=f"token ids from {wrong} to {wrong} in a vocabulary of 50"):
            pack(TopK(torch.tensor([[wrong]]), values), 50)
    with pytest.raises(ValueError, match="NaN"):
        pack(TopK(torch.tensor([[3]]), values * torch.nan), 50)
    rows = pack(TopK(torch.tensor([[3]]), values), 50)
    with pytest.raises(ValueError, match=r"no rows of 9 bytes, k 2 of 300"):
        unpack(rows, 2, 300)

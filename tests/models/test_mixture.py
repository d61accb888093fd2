"""Mixtures of predictions: against numbers by hand, and chunk by chunk against all logits at once."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch.nn import functional

from distill.losses import LOGITS
from distill.losses.chunked import HeadInput, chunks, through_heads
from distill.models.forward import Outputs
from distill.models.head import OutputHead
from distill.models.mixture import mix_classes, mix_heads, mix_sets, mix_values
from distill.teacher import Mixture

SHARES = torch.tensor([[0.25, 0.75], [1.0, 0.0]])


def heads():
    generator = torch.Generator().manual_seed(0)
    wide = OutputHead(torch.randn(11, 4, generator=generator), torch.randn(11, generator=generator), scale=0.5)
    return [wide, OutputHead(torch.randn(9, 6, generator=generator), cap=3.0)], [
        torch.randn(2, 5, width, generator=generator) for width in (4, 6)
    ]


def dense(parts, rows, shares):
    """The log of the weighted sum of softmaxes, as one writes it down; [B, L, V]."""
    each = [functional.softmax(part(own)[..., :9], -1) for part, own in zip(parts, rows, strict=True)]
    return sum(shares[:, None, None, number] * own for number, own in enumerate(each)).log()


def test_heads_of_two_widths_and_vocabularies_are_mixed_chunk_by_chunk():
    parts, rows = heads()
    last, head = mix_heads(rows, parts, SHARES.log(), None)
    assert last.shape == (2, 5, 4 + 6 + 2) and len(head.weight) == 9
    cut = [parts[0].__class__(parts[0].weight[:9], parts[0].bias[:9], 0.5), parts[1]]
    expected = dense(cut, rows, SHARES).flatten(0, 1)
    found = torch.empty(10, 9)
    for part, (logits,) in chunks([HeadInput(last.flatten(0, 1), head)], size=3):
        found[part] = logits
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(head(last).flatten(0, 1), expected)


def test_a_vocabulary_leaves_out_padded_rows_of_all_heads():
    parts, rows = heads()
    _, head = mix_heads(rows, parts, SHARES.log(), 7)
    assert [len(part.weight) for part in head.parts] == [7, 7] and len(head.parts[0].bias) == 7


def test_loss_and_gradient_are_those_of_the_mixture_written_down():
    parts, rows = heads()
    last, head = mix_heads(rows, parts, SHARES.log(), None)
    student = OutputHead(torch.randn(9, 3, generator=torch.Generator().manual_seed(1)).requires_grad_())
    own = torch.randn(10, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    target, labels = head(last).flatten(0, 1), torch.zeros(10, dtype=torch.int64)
    expected = LOGITS["forward_kl"](student(own), target, temperature=2.0).sum()
    slopes = torch.autograd.grad(expected, [own, student.weight])

    def terms(logits, teacher, _labels):
        return LOGITS["forward_kl"](logits, teacher, temperature=2.0).sum()[None]

    side = HeadInput(last.flatten(0, 1), head)
    loss, _ = through_heads(HeadInput(own, student), side, labels, terms, torch.ones(1), size=4)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, [own, student.weight]), slopes)


def test_probabilities_are_mixed_and_not_logits():
    logits = [torch.tensor([[0.0, log(3)]]), torch.tensor([[log(9), 0.0]])]  # 1/4 3/4 and 9/10 1/10
    mixed = mix_classes(logits, torch.tensor([[0.5, 0.5]]).log())
    torch.testing.assert_close(mixed.exp(), torch.tensor([[0.575, 0.425]]))
    sets = mix_sets([torch.tensor([[0.0]]), torch.tensor([[log(3)]])], torch.tensor([[0.25, 0.75]]).log())
    torch.testing.assert_close(sets, torch.tensor([[log(0.6875 / 0.3125)]]))  # 0.25 · 0.5 + 0.75 · 0.75
    values = mix_values([torch.tensor([[1.0]]), torch.tensor([[5.0]])], torch.tensor([[0.25, 0.75]]).log())
    torch.testing.assert_close(values, torch.tensor([[4.0]]))


def member(*rows):
    return lambda _batch: Outputs(torch.tensor(rows), hidden={0: torch.tensor(rows)})


def test_each_example_is_taught_by_the_teachers_of_its_route():
    mixture = Mixture(
        [member([0.0, log(3)], [0.0, 0.0]), member([log(9), 0.0], [log(4), 0.0])], [[1, 0], [0.5, 0.5]], "sequence"
    )
    found = mixture({"route": torch.tensor([0, 1])})
    torch.testing.assert_close(found.logits.exp(), torch.tensor([[0.25, 0.75], [0.65, 0.35]]))
    torch.testing.assert_close(found.hidden[0], torch.tensor([[0.0, log(3)], [0.0, 0.0]]))  # layers are the first one's


def test_the_answers_of_two_teachers_end_within_the_text():
    rows = [[[1.0, 2.0, 9.0], [0.0, 1.0, 9.0]]]
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    found = Mixture([member(*rows), member(*rows)], [[0.5, 0.5]], "span")(batch).logits
    expected = torch.tensor(rows)[..., :2].log_softmax(-1)
    torch.testing.assert_close(found[..., :2], expected)
    assert found[..., 2].eq(-torch.inf).all()


@pytest.mark.parametrize("kind", ["sequence", "multi_label", "regression"])
def test_a_mixture_of_one_teacher_with_itself_is_that_teacher(kind):
    rows = ([[0.3], [-2.0]],) if kind == "regression" else ([[0.3, -1.0, 2.0], [1.0, 0.0, -3.0]],)
    found = Mixture([member(*rows[0]), member(*rows[0])], [[0.3, 0.7]], kind)({"labels": torch.zeros(2)}).logits
    expected = torch.tensor(rows[0])
    torch.testing.assert_close(found, expected.log_softmax(-1) if kind == "sequence" else expected)

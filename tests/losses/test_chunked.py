"""The loss through the heads, chunk by chunk, against the plain loss on all logits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from distill.losses import LOGITS, Objective
from distill.losses.slopes import BLOCK
from distill.models.forward import Outputs
from distill.models.head import OutputHead
from distill.models.topk import TopK
from distill.recipe.schema import Term

B, L, V, D = 5, 7, 40, 6
LENGTHS = [7, 4, 0, 2, 6]  # one example is nothing but padding
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.3},
    "capped": {"cap": 1.5},
    "everything": {"bias": True, "scale": 3.0, "cap": 2.0},
}
own_loss = "test_chunked:cubed"


def cubed(student, teacher, *, temperature=1.0, power: float = 3.0):
    return ((student - teacher) / temperature).abs().pow(power).mean(-1)


def side(seed, width=D, vocabulary=V, *, bias=False, dtype=torch.float32, **head):
    draw = torch.Generator().manual_seed(seed)
    last = torch.randn(B, L, width, generator=draw, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, width, generator=draw, dtype=torch.float64).to(dtype)
    added = torch.randn(vocabulary, generator=draw, dtype=torch.float64).to(dtype) if bias else None
    return Outputs(None, {}, last, OutputHead(weight, added, **head))


def batch_of(seed=2):
    mask = (torch.arange(L) < torch.tensor(LENGTHS)[:, None]).long()
    labels = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(seed)).masked_fill(mask == 0, -100)
    labels[0, 2:4] = -100
    return {"attention_mask": mask, "labels": labels}


def as_logits(outputs):
    return Outputs(outputs.head(outputs.last))


def learn(objective, student, teacher, batch, *, plain=False):
    """Loss, sums and the gradients of rows, weight and bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in (student.last, student.head.weight)]
    bias = None if student.head.bias is None else student.head.bias.detach().requires_grad_()
    own = Outputs(None, {}, leaves[0], replace(student.head, weight=leaves[1], bias=bias))
    if plain:
        own, teacher = as_logits(own), as_logits(teacher)
    loss, sums = objective(own, teacher, batch, objective.counts([batch]))
    loss.backward()
    return [loss.detach(), sums, *(leaf.grad for leaf in [*leaves, bias] if leaf is not None)]


def close(found, expected, limit=1e-6, what=None):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= limit * other.norm(), (what, (one - other).norm() / other.norm())


@pytest.mark.parametrize("column", range(len(HEADS)), ids=list(HEADS))
def test_chunks_give_the_loss_and_every_gradient_of_the_plain_form(column):
    head = list(HEADS.values())[column]
    for row, loss in enumerate([*LOGITS, own_loss]):  # with every other pair of settings at least once
        kind, chunk = ("next_token", "masked_token")[(row + column) % 2], (1, 7, None)[(row + column) % 3]
        terms = [Term(match="labels", weight=0.3), Term(match="logits", loss=loss, temperature=1.7)]
        student, teacher = side(0, vocabulary=V + 3, **head), side(1, width=D + 2, vocabulary=V + 5, **head)
        expected = learn(Objective(terms, kind, vocabulary=V), student, teacher, batch_of(), plain=True)
        found = learn(Objective(terms, kind, vocabulary=V, chunk=chunk), student, teacher, batch_of())
        close(found, expected, what=loss)


def test_several_terms_share_one_pass_over_small_blocks(monkeypatch):
    monkeypatch.setitem(BLOCK, "cpu", 2 * V)
    terms = [Term(match="labels"), *(Term(match="logits", loss=name, weight=0.2) for name in LOGITS)]
    student, teacher = side(0), side(1)
    expected = learn(Objective(terms, "next_token"), student, teacher, batch_of(), plain=True)
    close(learn(Objective(terms, "next_token", chunk=5), student, teacher, batch_of()), expected)


def test_a_sparse_teacher_is_compared_chunk_by_chunk_too():
    for name in LOGITS:
        objective = Objective([Term(match="logits", loss=name)], "next_token", vocabulary=V, chunk=4)
        batch, teacher, results = batch_of(), Outputs(TopK.of(as_logits(side(1)).logits, 5)), []
        for plain in (False, True):
            student = side(0)
            student.last.requires_grad_()
            loss, sums = objective(as_logits(student) if plain else student, teacher, batch, objective.counts([batch]))
            loss.backward()
            results.append([loss.detach(), sums, student.last.grad])
        close(*results, what=name)


@pytest.mark.parametrize("kind", ["next_token", "masked_token", "seq2seq"])
def test_labels_alone_need_no_teacher(kind):
    objective = Objective([Term(match="labels")], kind)
    expected = learn(objective, side(0), side(1), batch_of(), plain=True)
    close(learn(objective, side(0), side(1), batch_of()), expected)


def test_a_frozen_head_gets_no_gradient_and_a_tied_one_gets_both():
    objective, batch = Objective([Term(match="logits")], "next_token", chunk=3), batch_of()
    teacher = side(1)
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(5))
    ids = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(6))
    gradients = []
    for through_head in (True, False):
        weight = table.clone().requires_grad_()
        own = Outputs(None, {}, functional.embedding(ids, weight), OutputHead(weight))
        own = own if through_head else as_logits(own)
        objective(own, teacher, batch, objective.counts([batch]))[0].backward()
        gradients.append(weight.grad)
    close(gradients[:1], gradients[1:])
    last = side(0).last.requires_grad_()
    frozen = Outputs(None, {}, last, OutputHead(table))
    objective(frozen, teacher, batch, objective.counts([batch]))[0].backward()
    assert last.grad.ne(0).any() and table.grad is None


@pytest.mark.parametrize("terms", [[Term(match="labels")], [Term(match="logits")]])
def test_no_valid_position_is_a_zero_with_zero_gradients(terms):
    batch = {"attention_mask": torch.zeros(B, L), "labels": torch.full((B, L), -100)}
    loss, sums, *gradients = learn(Objective(terms, "next_token"), side(0, bias=True), side(1), batch)
    assert loss == 0 and not sums.any() and len(gradients) == 3
    assert all(gradient.eq(0).all() for gradient in gradients)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn():
    for loss in sorted(set(LOGITS) - {"soft_cross_entropy"}):
        objective = Objective([Term(match="logits", loss=loss)], "next_token", chunk=4)
        found = learn(objective, side(0, cap=2.0), side(0, cap=2.0), batch_of())
        assert found[0] == 0 and found[1] == 0, loss


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_holds_all_logits():
    for loss in LOGITS:
        tokens, width, vocabulary = 400, 4, 50
        draw = torch.Generator().manual_seed(0)
        own, target = (
            Outputs(None, {}, torch.randn(4, tokens // 4, width, generator=draw).requires_grad_(), OutputHead(head))
            for head in torch.randn(2, vocabulary, width, generator=draw).requires_grad_()
        )
        batch = {"attention_mask": torch.ones(4, tokens // 4), "labels": torch.zeros(4, tokens // 4, dtype=torch.int64)}
        objective = Objective([Term(match="labels"), Term(match="logits", loss=loss)], "next_token", chunk=20)
        with Largest() as largest:
            objective(own, target, batch, objective.counts([batch]))[0].backward()
        assert largest.elements <= max(2 * 20 * vocabulary, tokens * width) < tokens * vocabulary / 9, loss


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_logits_are_never_rounded_below_fp32(kind):
    """A student close to its teacher, half-precision weights: the gradient is that of the same numbers in float64."""
    width, vocabulary, tokens = 64, 2000, 64
    draw = torch.Generator().manual_seed(0)
    target = torch.randn(vocabulary, width, generator=draw).to(kind)
    weight = (target.float() + 0.008 * torch.randn(vocabulary, width, generator=draw)).to(kind)
    last = torch.randn(1, tokens, width, generator=draw).to(kind)
    batch = {"attention_mask": torch.ones(1, tokens), "labels": torch.zeros(1, tokens, dtype=torch.int64)}
    objective = Objective([Term(match="logits")], "next_token")
    found = []
    for dtype in (kind, torch.float64):
        leaf = last.to(dtype, copy=True).requires_grad_()
        own, theirs = (OutputHead(side.to(dtype)) for side in (weight, target))
        loss, _ = objective(Outputs(None, {}, leaf, own), Outputs(None, {}, last.to(dtype), theirs), batch,
                            objective.counts([batch]))  # fmt: skip
        found.append((loss, leaf))
        loss.backward()
    assert 0.0005 < found[1][0] < 0.01
    assert abs(found[0][0] / found[1][0] - 1) < 1e-3
    # What backward hands on is rounded to the dtype of the rows, once and relative to itself.
    rounding = 2**-8 if kind == torch.bfloat16 else 1e-3
    assert (found[0][1].grad.double() - found[1][1].grad).norm() < rounding * found[1][1].grad.norm()


def test_the_gradient_is_exact_near_the_teacher():
    width, vocabulary, tokens = 64, 2000, 64
    draw = torch.Generator().manual_seed(0)
    target = torch.randn(vocabulary, width, generator=draw)
    student = side(0, width, vocabulary), torch.randn(1, tokens, width, generator=draw)
    weight = target + 0.008 * torch.randn(vocabulary, width, generator=draw)
    batch = {"attention_mask": torch.ones(1, tokens), "labels": torch.zeros(1, tokens, dtype=torch.int64)}
    objective = Objective([Term(match="logits")], "next_token")
    results = []
    for dtype in (torch.float32, torch.float64):
        own, theirs = (Outputs(None, {}, student[1].to(dtype), OutputHead(head.to(dtype))) for head in (weight, target))
        results.append(learn(objective, own, theirs, batch))
    assert 0.0005 < results[1][0] < 0.01
    close(results[0], results[1], 1e-3)


def test_autocast_leaves_the_loss_in_fp32():
    objective, batch = Objective([Term(match="labels"), Term(match="logits")], "next_token"), batch_of()
    expected = learn(objective, side(0), side(1), batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = learn(objective, side(0), side(1), batch)
    close(found, expected, 0)


def test_gradients_in_float64_are_derivatives():
    student, teacher, batch = side(0, bias=True, cap=2.0, dtype=torch.float64), side(1, dtype=torch.float64), batch_of()

    def value(objective, last, weight, bias):
        own = Outputs(None, {}, last, replace(student.head, weight=weight, bias=bias))
        return objective(own, teacher, batch, objective.counts([batch]))[0]

    for loss in LOGITS:
        objective = Objective([Term(match="labels"), Term(match="logits", loss=loss)], "next_token", chunk=4)
        leaves = [t.clone().requires_grad_() for t in (student.last, student.head.weight, student.head.bias)]
        assert torch.autograd.gradcheck(partial(value, objective), leaves, fast_mode=True), loss

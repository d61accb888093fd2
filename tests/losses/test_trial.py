"""Losses of the user's own that cannot teach are refused before anything is trained, and called once for that."""

from __future__ import annotations

import re

import pytest
import torch

from distill.errors import InputError
from distill.losses import LayerMap, Objective
from distill.models.forward import Outputs
from distill.recipe.schema import Term

CALLS: list[tuple[int, ...]] = []


def fine(student, teacher, *, groups: int = 1, size: float = 1.0):
    CALLS.append(tuple(student.shape))
    return (student - teacher).view(len(student), groups, -1).square().mean((1, 2)) * size


def one_argument(student):
    return student.sum(-1)


def missing(student, teacher, *, size):
    return (student - teacher).sum(-1) * size


def own_mean(student, teacher):
    return (student - teacher).square().mean()


def no_heads(student, teacher, visible):
    return (student - teacher).square().sum((1, 2, 3))


def detached(student, teacher):
    return (student.detach() - teacher).square().mean(-1)


def other_gradient(student, teacher):
    weight = torch.ones((), requires_grad=True)
    return (student.detach() * weight - teacher).mean(-1)


def whole_numbers(student, teacher, *, temperature=1.0):
    return (student.argmax(-1) != teacher.argmax(-1)).long()


def numbers(student, teacher):
    return [0.0, 0.0]


def in_place(student, teacher):
    return student.sub_(teacher).square().mean(-1)


def objective(term, head="sequence"):
    return Objective([Term(match="labels"), term], head, lambda _policy: LayerMap(((0, 0),)))


@pytest.mark.parametrize(
    ("match", "loss", "message"),
    [
        ("hidden", "one_argument", "'test_trial:one_argument' cannot be called with 2 arguments by position"),
        (
            "logits",
            "own_mean",
            "takes no temperature; a loss of match: logits is called as function(student, teacher, *",
        ),
        ("hidden", "missing", "TypeError: missing() missing 1 required keyword-only argument: 'size'"),
        ("hidden", "own_mean", "must return one value per position, (2,), got ()"),
        ("embeddings", "own_mean", "must return one value per position, (2,), got ()"),
        ("attention", "no_heads", "must return one value per position, (1, 2), got (1,)"),
        ("relations", "no_heads", "TypeError: unsupported operand type"),
        ("hidden", "detached", "no gradient for the student"),
        ("hidden", "other_gradient", "no gradient for the student"),
        ("logits", "whole_numbers", "must return one value per position, (2,), got (2,) torch.int64"),
        ("hidden", "numbers", "must return one value per position, (2,), got list"),
        ("hidden", "in_place", "RuntimeError: a leaf Variable"),
    ],
)
def test_a_loss_that_cannot_teach_is_one_error_with_its_key_and_name(match, loss, message):
    with pytest.raises(InputError, match=rf"^losses\.1.*{re.escape(message)}") as found:
        objective(Term(match=match, loss=f"test_trial:{loss}"))
    assert loss in str(found.value)


@pytest.mark.parametrize(
    ("params", "message"),
    [({"heads": 0}, "heads must be 1 or more"), ({"heads": -2}, "heads must be 1 or more")],
)
def test_a_wrong_number_of_relation_heads_is_refused(params, message):
    with pytest.raises(InputError, match=rf"losses\.1\.params.*{message}"):
        objective(Term(match="relations", params=params))


@pytest.mark.parametrize("loss", ["qkv", "values"])
def test_any_number_of_relation_heads_may_fit_a_model(loss):
    for heads in (1, 7, 12, 48):
        objective(Term(match="relations", loss=loss, params={"heads": heads}))


@pytest.mark.parametrize(
    "term",
    [
        Term(match="relations", params={"heads": 1}, schedule={"params": {"heads": 2}}),
        Term(match="hidden", loss="test_trial:fine", params={"groups": 1}, schedule={"params": {"groups": 2}}),
    ],
)
def test_a_whole_number_has_no_schedule(term):
    with pytest.raises(InputError, match=r"losses\.1\.schedule\.params\.\w+: a whole number"):
        objective(term)


def test_a_loss_is_called_once_and_leaves_the_random_numbers_alone():
    CALLS.clear()
    before = torch.random.get_rng_state()
    objective(Term(match="hidden", loss="test_trial:fine", params={"groups": 5}, schedule={"weight": 0.0}))
    assert CALLS == [(2, 320)] and torch.equal(torch.random.get_rng_state(), before)
    CALLS.clear()
    objective(Term(match="hidden", loss="test_trial:fine", params={"size": 1}, schedule={"params": {"size": 2}}))
    assert len(CALLS) == 2  # both ends of its schedule


def test_what_only_the_models_show_is_an_error_with_the_key():
    term = objective(Term(match="relations", params={"heads": 5}))
    batch = {"attention_mask": torch.ones(1, 3), "labels": torch.zeros(1, dtype=torch.int64)}
    side = Outputs(torch.zeros(1, 2), relations={0: [torch.zeros(1, 3, 8)] * 3})
    with pytest.raises(InputError, match=r"losses\.1: relations\.qkv: 8 columns cannot be split into 5"):
        term(side, side, batch, term.counts([batch]))

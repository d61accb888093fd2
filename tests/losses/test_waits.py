"""On a GPU the host waits for the device where the length of a result is not known: once for each kind of position."""

from __future__ import annotations

import pytest
import torch
from test_objective import TERMS, maps, sample
from torch.utils._python_dispatch import TorchDispatchMode

from distill.losses import Objective
from distill.recipe.schema import Term


class Waits(TorchDispatchMode):
    """Operations whose result has a length that only the device knows."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = [index for index in (args[1] if function.overloadpacket in INDEXED else []) if index is not None]
        self.count += function.overloadpacket in (torch.ops.aten.nonzero, torch.ops.aten._local_scalar_dense)
        self.count += any(mask.dtype == torch.bool for mask in masks)
        return function(*args, **(kwargs or {}))


INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_, torch.ops.aten.index_put)


@pytest.mark.parametrize(
    ("head", "terms", "expected"),
    [
        ("sequence", TERMS[:1], 1),
        ("sequence", TERMS, 2),  # examples, and tokens
        ("next_token", [*TERMS, Term(match="logits", loss="jsd"), Term(match="hidden", map=[(0, 1), (1, 3)])], 2),
        ("token", TERMS, 1),  # tokens predict, and are compared
        ("next_token", TERMS[2:], 1),
    ],
)
def test_each_mask_is_looked_at_once_and_not_in_the_backward_pass(head, terms, expected):
    student, teacher, batch = sample("next_token" if head == "token" else head)
    objective = Objective(terms, head, maps)
    counts = objective.counts([batch])
    with Waits() as waits:
        objective(student, teacher, batch, counts)[0].backward()
    assert waits.count == expected


@pytest.mark.parametrize("head", ["sequence", "next_token"])
def test_nobody_waits_for_positions_that_came_with_the_batch(head):
    student, teacher, batch = sample(head)
    objective = Objective([*TERMS, Term(match="hidden", map=[(0, 1)])], head, maps)
    plain = objective(student, teacher, batch, objective.counts([batch]))
    located, counts = objective.locate(batch), objective.counts([batch])
    with Waits() as waits:
        found = objective(student, teacher, located, counts)
        found[0].backward()
    assert waits.count == 0 and set(batch) < set(located)
    assert all(torch.equal(*pair) for pair in zip(found, plain, strict=True))

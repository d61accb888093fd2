"""One step of every kind of term, however the tokens are dealt out: micro-batches, processes, padding, packing."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from forked import Processes
from tiny import VOCABULARY, tiny_model
from torch.nn.parallel import DistributedDataParallel

from distill.losses import Objective, layer_map
from distill.models.forward import forward
from distill.ranks import process_state
from distill.recipe.schema import Term
from distill.training.learner import gradient_checkpointing
from distill.training.model import DistillModel

TERMS = [
    Term(match="labels", weight=0.3),
    Term(match="logits", temperature=2.0),
    Term(match="logits", loss="jsd", weight=0.5),
    Term(match="hidden", loss="relative_mse", map=[(0, 1), (1, 3)]),
    Term(match="embeddings", weight=0.1),
    Term(match="relations", map="last", params={"heads": 2}),
]
LENGTHS = (9, 5, 3, 8, 2, 1)


def texts():
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (length,), generator=draw) for length in LENGTHS]


def padded(rows, extra=0):
    longest = max([len(row) for row in rows], default=1) + extra
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(rows):
    """All texts in one row; positions and attention start anew with each."""
    ids = torch.cat(rows)[None]
    lengths = torch.tensor([len(row) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
        "document_ids": torch.repeat_interleave(torch.arange(len(rows)), lengths)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
    }


def nothing():
    """A micro-batch without a valid token: a process that got no text."""
    ids = torch.zeros(1, 4, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": ids, "labels": ids - 100}


def splits():
    rows = texts()
    return {
        "whole": [padded(rows)],
        "more padding": [padded(rows, 7)],
        "two": [padded(rows[:2]), padded(rows[2:])],
        "one by one": [padded([row]) for row in rows],
        "packed": [packed(rows)],
        "packed in two": [packed(rows[:3]), packed(rows[3:])],
        "mixed": [padded(rows[4:]), packed(rows[:4])],
        "with an empty one": [padded(rows[:3]), nothing(), padded(rows[3:]), nothing()],
    }


def models():
    student, teacher = tiny_model("llama", num_hidden_layers=2), tiny_model("llama", seed=1)
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    objective = Objective(
        TERMS, "next_token", lambda policy: layer_map(policy, None, 2, 4), vocabulary=VOCABULARY - 3, chunk=4
    )
    return DistillModel(student, objective), teacher


def step(model, teacher, batches, counts, scale=1.0):
    """Loss and sums of the micro-batches; the gradients stay on the model."""
    objective = getattr(model, "module", model).objective
    total, sums = torch.zeros(()), torch.zeros(len(objective.names))
    for batch in batches:
        with torch.no_grad():
            target = forward(teacher, batch, objective.teacher)
        loss, parts = model(batch, target, counts)
        (loss * scale).backward()
        total, sums = total + loss.detach(), sums + parts
    return total, sums


def gradients(model):
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def check(found, expected):
    for one, other in zip(found, expected, strict=True):
        limit = 1e-6 * max(other.norm(), 1e-2)  # a key's bias has no gradient but rounding
        assert (one - other).norm() <= limit, ((one - other).norm() / other.norm()).item()


@pytest.fixture(scope="module")
def whole():
    model, teacher = models()
    batches = splits()["whole"]
    loss, sums = step(model, teacher, batches, model.objective.counts(batches))
    return [loss, sums, *gradients(model)]


@pytest.mark.parametrize("name", list(splits()))
def test_every_split_into_micro_batches_gives_the_same_step(name, whole):
    model, teacher = models()
    batches = splits()[name]
    loss, sums = step(model, teacher, batches, model.objective.counts(batches))
    assert loss > 0.1 and (sums > 0).all()
    check([loss, sums, *gradients(model)], whole)


def shares():
    """What each of two processes has of a step, in three ways."""
    rows = texts()
    return [
        ([padded(rows[:3])], [padded(rows[3:])]),
        ([padded(rows[:1]), packed(rows[1:3])], [packed(rows[3:5]), padded(rows[5:], 2)]),
        ([padded(rows)], [nothing()]),
    ]


def step_as_one_of_two(folder):
    rank = process_state().process_index
    results = []
    for share in shares():
        # Models of its own: a wrapper that is not collected yet would answer the gradients of the next one, and only
        # on the process where it is not.
        model, teacher = models()
        counts = model.objective.counts(share[rank])
        dist.all_reduce(counts)
        wrapped = DistributedDataParallel(model)
        with wrapped.no_sync():
            loss, sums = step(wrapped, teacher, share[rank][:-1], counts, scale=2.0)
        last = step(wrapped, teacher, share[rank][-1:], counts, scale=2.0)
        both = torch.cat([(loss + last[0])[None], sums + last[1]])
        dist.all_reduce(both)
        results.append([both[0], both[1:], *(gradient.clone() for gradient in gradients(model))])
    if rank == 0:
        torch.save(results, folder / "results")
    dist.barrier()


def test_two_processes_give_the_same_step(whole, tmp_path):
    started = Processes(tmp_path / "log", step_as_one_of_two, tmp_path, ranks=2)
    assert started.wait() == [0, 0], started.said
    for found in torch.load(tmp_path / "results", weights_only=True):
        check(found, whole)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    _, teacher = models()
    pairs = [(0, 0), (3, 3)]
    names = ["mse", "cosine", "normalized_mse", "relative_mse"]
    terms = [Term(match="logits"), *(Term(match="hidden", loss=name, map=pairs) for name in names)]
    terms += [Term(match="embeddings"), Term(match="attention", map=pairs), Term(match="relations", map=pairs)]
    objective = Objective(terms, "next_token", lambda policy: layer_map(policy, None, 4, 4))
    batches = splits()["two"]
    loss, sums = step(DistillModel(teacher, objective), teacher, batches, objective.counts(batches))
    assert loss == 0 and not sums.any()


def test_gradient_checkpointing_changes_nothing():
    results = []
    for checkpointing in (False, True):
        model, teacher = models()
        if checkpointing:
            gradient_checkpointing(model.student, "enable")({"use_reentrant": False})
        model.student.train()
        batches = splits()["two"]
        loss, sums = step(model, teacher, batches, model.objective.counts(batches))
        results.append([loss, sums, *gradients(model)])
    check(*results)

"""The loss is computed in fp32 whatever the models run in."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from distill.losses import HEADS, RELATION, Objective, layer_map
from distill.models.head import OutputHead
from distill.models.outputs import Outputs
from distill.recipe.schema import Term

B, L, D, H = 3, 5, 16, 2
MASK = (torch.arange(L) < torch.tensor([5, 3, 4])[:, None]).long()
ON_LAYERS = {
    "hidden": Term(match="hidden", map="last"),
    "relations": Term(match="relations", map="last", params={"heads": 2}),
    "values": Term(match="relations", loss="values", map="last"),
    "attention": Term(match="attention", map="last"),
}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def maps(policy):
    return layer_map(policy, None, student_layers=1, teacher_layers=1)


def everything(seed, width, near=0.0):
    """One layer's states, projections and attention; `near` > 0: so far from those of seed 0."""

    def draw(*shape):
        return noise(*shape) + near * noise(*shape, seed=seed) if near else noise(*shape, seed=seed)

    scores = draw(B, H, L, L).masked_fill(MASK[:, None, None] == 0, -torch.inf)
    vectors = [draw(B, L, width) for _ in range(3)]
    return Outputs(draw(B, 4), {0: draw(B, L, width)}, attention={0: scores.softmax(-1)}, relations={0: vectors})


def tensors(outputs):
    return [outputs.logits, outputs.hidden[0], outputs.attention[0], *outputs.relations[0]]


def learn(objective, student, teacher, dtype=torch.float32, autocast=False):
    """The loss and all gradients of the student and of what the objective learns."""
    own, theirs = (
        Outputs(new[0], {0: new[1]}, attention={0: new[2]}, relations={0: new[3:]})
        for side in (student, teacher)
        for new in [[tensor.to(dtype, copy=True) for tensor in tensors(side)]]
    )
    leaves = [tensor.requires_grad_() for tensor in tensors(own)] + [*objective.projections.to(dtype).parameters()]
    batch = {"attention_mask": MASK, "labels": torch.zeros(B, dtype=torch.int64)}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, _ = objective(own, theirs, batch, objective.counts([batch]))
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [loss.detach(), *(gradient for gradient in found if gradient is not None)]


@pytest.mark.parametrize("name", ON_LAYERS)
def test_autocast_leaves_terms_on_layers_in_fp32(name):
    student, teacher = everything(0, D), everything(1, D + 8 * (name in ("hidden", "relations")))
    objective = Objective([ON_LAYERS[name]], "sequence", maps)
    objective.project(D, teacher.hidden[0].shape[-1])
    expected = learn(objective, student, teacher)
    found = learn(objective, student, teacher, autocast=True)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


@pytest.mark.parametrize("match", ["logits", "output"])
def test_autocast_leaves_embeddings_in_fp32(match):
    objective = Objective([Term(match=match)], "embedding")
    expected = learn(objective, everything(0, D), everything(1, D))
    found = learn(objective, everything(0, D), everything(1, D), autocast=True)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ON_LAYERS)
def test_near_the_teacher_the_gradient_is_that_of_float64(name):
    student, teacher = everything(1, D, near=0.05), everything(0, D)
    objective = Objective([ON_LAYERS[name]], "sequence", maps)
    expected = learn(objective, student, teacher, torch.float64)
    found = learn(objective, student, teacher, autocast=True)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm()


@pytest.mark.parametrize("name", RELATION)
def test_relations_are_fp32_by_themselves(name):
    own, target = ([noise(B, L, D, seed=seed + side) for side in range(3)] for seed in (0, 3))
    seen = torch.ones(B, L, L, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = RELATION[name](own, target, seen)
        cosines = HEADS["embedding"].predictions(own[0][:, 0], {"attention_mask": MASK})
    assert torch.equal(found, RELATION[name](own, target, seen)) and cosines.dtype == torch.float32


@dataclass(frozen=True)
class Watched(OutputHead):
    """Notes whether autocast is on when the head is asked for its operands."""

    seen: list[bool] = field(default_factory=list)

    def operands(self, rows):
        self.seen.append(torch.is_autocast_enabled("cpu"))
        return super().operands(rows)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_vocabulary_head_sees_the_autocast_around_the_objective(autocast):
    """On a GPU that decides the dtype of its operands."""
    heads = [Watched(noise(32, D, seed=seed)) for seed in (0, 1)]
    own, target = (Outputs(None, {}, noise(B, L, D).requires_grad_(), head) for head in heads)
    batch = {"labels": torch.zeros(B, L, dtype=torch.int64), "attention_mask": MASK}
    objective = Objective([Term(match="logits")], "next_token")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        objective(own, target, batch, objective.counts([batch]))
    assert heads[0].seen and set(heads[0].seen + heads[1].seen) == {autocast}

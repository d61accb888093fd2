"""The loss is computed in fp32 whatever the models run in."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from tiny import tiny_batch, tiny_model

from distill.losses import LOGITS, PREDICTION_KINDS, RELATION, Objective, layer_map
from distill.models.forward import Outputs, forward
from distill.models.head import OutputHead, class_head
from distill.recipe.schema import Term
from distill.teacher import LiveTeacher
from distill.training.learner import gradient_checkpointing

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
    visible = torch.ones(B, L, L, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = RELATION[name](own, target, visible)
        cosines = PREDICTION_KINDS["embedding"].predictions(own[0][:, 0], {"attention_mask": MASK})
    assert torch.equal(found, RELATION[name](own, target, visible)) and cosines.dtype == torch.float32


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


# Logits


def gradient_by_logits(student, teacher):
    return (student.double().softmax(-1) - teacher.double().softmax(-1)) / len(student)


def near(weight, by):
    """A student's head so close to this one of its teacher that KL is about 0.002."""
    return (weight.float() + by * noise(*weight.shape, seed=9)).to(weight.dtype)


SEEN: list[list[torch.Tensor]] = []


def watched_kl(student, teacher, *, temperature=1.0):
    """Forward KL that keeps what it is given."""
    SEEN.append([student.detach().clone(), teacher.clone()])
    return LOGITS["forward_kl"](student, teacher, temperature=temperature)


@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_a_vocabulary_head_near_its_teacher_has_the_gradient_of_float64(how):
    target = (noise(2000, 64) / 2).bfloat16()
    weight, rows = near(target, 0.008), noise(1, 64, 64, seed=1).bfloat16()
    own = weight if how == "bf16" else weight.float()
    own = own.requires_grad_()
    objective = Objective([Term(match="logits", loss="test_precision:watched_kl")], "next_token", chunk=63)
    batch = {"attention_mask": torch.ones(1, 64), "labels": torch.zeros(1, 64, dtype=torch.int64)}
    SEEN.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        student, teacher = (Outputs(None, {}, rows, OutputHead(head)) for head in (own, target))
        loss, _ = objective(student, teacher, batch, objective.counts([batch]))
    exact = [rows[0, :-1].double() @ head.double().T for head in (weight, target)]
    found, expected = (gradient_by_logits(*pair) for pair in (map(torch.cat, zip(*SEEN, strict=True)), exact))
    assert 0.001 < loss.detach() < 0.004
    assert (found - expected).norm() <= 1e-3 * expected.norm()
    loss.backward()
    if how == "autocast":  # in bf16 it is rounded once more, when it is handed out
        by_weight = expected.T @ rows[0, :-1].double()
        assert (own.grad - by_weight).norm() <= 1e-3 * by_weight.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_classes_near_their_teacher_have_the_gradient_of_float64(family, checkpointing):
    """What remains is the rounding of the bodies: heads and loss add nothing to it."""
    teacher, student = tiny_model(family), tiny_model(family)
    with torch.no_grad():
        for model in (teacher, student):
            class_head(model).weight.mul_(30)
        class_head(student).weight.copy_(near(class_head(teacher).weight, 0.01))
    if checkpointing:
        gradient_checkpointing(student, "enable")({"use_reentrant": False})
    teacher.bfloat16()
    student.train()
    for module in student.modules():
        module.p = 0.0
    read = []
    for model in (student, teacher):
        class_head(model).register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0].detach()))
    batch = tiny_batch(rows=32, padded=False) | {"labels": torch.zeros(32, dtype=torch.int64)}
    objective = Objective([Term(match="logits")], "sequence")
    counts = objective.counts([batch])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = forward(student, batch, objective.student)
        loss, _ = objective(own, LiveTeacher(teacher, objective.teacher, torch.device("cpu"))(batch), batch, counts)
    loss.backward()
    heads = [class_head(model) for model in (student, teacher)]
    exact = [h.double() @ head.weight.double().T + head.bias.double() for h, head in zip(read, heads, strict=True)]
    expected = gradient_by_logits(*exact).T @ read[0].double()
    assert loss.detach() < 0.01 and own.logits.dtype == torch.float32 and read[1].dtype == torch.bfloat16
    assert (heads[0].weight.grad - expected).norm() <= 1e-3 * expected.norm()
    assert all(parameter.grad is not None for parameter in student.classifier.parameters())

from __future__ import annotations

import pytest
import torch
from tiny import tiny_batch, tiny_model

from distill.losses import Objective, layer_map
from distill.models.layout import layers_of
from distill.models.prefix import shared_layers
from distill.recipe.schema import Student, Term
from distill.student import build_student, plan_student
from distill.teacher import OnlineTeacher
from distill.training.model import DistillModel
from distill.training.setup import freeze

CPU = torch.device("cpu")
FROZEN = {"llama": ["*embed_tokens*", "*layers.[01].*"], "bert": ["*.embeddings.*", "*.layer.[01].*"]}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def pair(family, **changes):
    changes |= NO_DROPOUT if family == "bert" and not changes else {}
    teacher = tiny_model(family, **changes)
    plan = plan_student(teacher, Student(layers={"keep": [0, 1, 3]}, mlp={"score": "magnitude"}))
    student = build_student(teacher, plan)
    freeze(student, FROZEN[family])
    return student, teacher


@pytest.mark.parametrize("family", FROZEN)
def test_sharing_changes_neither_loss_nor_gradient_and_runs_the_layers_once(family):
    head = "next_token" if family == "llama" else "sequence"
    batch = tiny_batch()
    batch["labels"] = batch["input_ids"] if head == "next_token" else torch.tensor([0, 1, 2])
    terms = [Term(match="labels"), Term(match="logits"), Term(match="hidden", map=[(0, 0), (1, 2), (2, 3)])]
    results = []
    for sharing in (False, True):
        student, teacher = pair(family)
        objective = Objective(terms, head, lambda policy: layer_map(policy, None, 3, 4))
        source, model = OnlineTeacher(teacher, objective.teacher, CPU), DistillModel(student, objective).train()
        ran = []
        for number, layer in enumerate(layers_of(student)):
            inner = next(layer.children())
            inner.register_forward_hook(lambda *_args, ran=ran, number=number: ran.append(number))
        if sharing:
            assert source.share(student, objective.student) == 2
        loss, sums = model(batch, source(batch), objective.counts([batch]))
        loss.backward()
        assert ran == ([2] if sharing else [0, 1, 2])
        assert not any("forward" in layer.__dict__ for layer in layers_of(student))
        results.append([loss.detach(), sums, *(p.grad for p in student.parameters() if p.grad is not None)])
    for own, shared in zip(*results, strict=True):
        assert torch.equal(own, shared)


def test_only_what_is_equal_frozen_and_without_dropout_is_shared():
    student, teacher = pair("llama")
    assert shared_layers(student, teacher) == 2
    layers_of(student)[1].self_attn.q_proj.weight.data[0, 0] += 1
    assert shared_layers(student, teacher) == 1
    freeze(student, ["*layers.[01].*"])  # the embeddings learn
    assert shared_layers(student, teacher) == 0
    dropping = pair("bert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.0)
    assert shared_layers(*dropping) == 0
    attention = pair("llama", attention_dropout=0.1)
    assert shared_layers(*attention) == 0


def test_layers_whose_insides_are_read_are_not_shared():
    student, teacher = pair("llama")
    objective = Objective([Term(match="relations", map=[(1, 1)])], "next_token",
                          lambda policy: layer_map(policy, None, 3, 4))  # fmt: skip
    assert OnlineTeacher(teacher, objective.teacher, CPU).share(student, objective.student) == 1

"""Prompts of a batch, and the batch that other answers to them make: what is read, learned and counted, by hand."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from distill.data import TASKS
from distill.data.tasks.causal_lm import CausalLM
from distill.data.tasks.chat import Chat
from distill.data.tasks.seq2seq import Seq2Seq
from distill.losses import LayerMap, Objective
from distill.models.forward import UNLABELLED, with_decoder_inputs
from distill.recipe.names import PROMPTED_TASKS
from distill.recipe.schema import Term
from distill.training.on_policy import unlabelled

TERMS = [Term(match="labels"), Term(match="logits"), Term(match="hidden")]


def one_pair(_policy):
    return LayerMap(((0, 0),))


def as_lists(tensors):
    return [None if tensor is None else tensor.tolist() for tensor in tensors]


def test_the_tasks_of_the_recipe_are_those_that_give_prompts():
    assert {name for name, task in TASKS.items() if task().prompted} == set(PROMPTED_TASKS)


def test_a_conversation_is_answered_from_where_its_last_answer_begins():
    # Row 0: two conversations, 4 turns and 2; row 1: one that begins with its only answer, one with a prompt; padding.
    batch = {
        "input_ids": torch.tensor([[10, 11, 12, 13, 14, 15, 20, 21, 22], [30, 31, 40, 41, 42, 43, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3]),
        "learned": torch.tensor([[0, 1, 0, 0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 1, 1, 0, 0, 0]]).bool(),
        "document_ids": torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0, 0]]),
    }
    assert as_lists(Chat().prompts(batch)) == [[10, 11, 12, 13], [20], None, [40, 41]]
    alone = {name: tensor[:1, :6] for name, tensor in batch.items() if name != "document_ids"}
    assert as_lists(Chat().prompts(alone)) == [[10, 11, 12, 13]]


def test_answers_behind_their_prompts_are_compared_with_the_teacher_and_have_no_labels():
    prompts, answers = [torch.tensor([10, 11, 12]), torch.tensor([20])], [torch.tensor([5, 2]), torch.tensor([6, 2, 7])]
    batch = unlabelled(Chat().with_answers(prompts, answers, padding=0, sizes=()))
    assert batch["input_ids"].tolist() == [[10, 11, 12, 5, 2], [20, 6, 2, 7, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1] * 4 + [0]]
    assert batch["learned"].int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 0]]
    assert (batch["labels"] == UNLABELLED).all() and "padded" in batch
    # Two and three tokens of answers; their states are those of the tokens that predict them.
    assert Objective(TERMS, "next_token", one_pair).counts([batch]).tolist() == [0, 5, 5]
    assert Chat().with_answers(prompts, answers, padding=0, sizes=(8,))["input_ids"].shape == (2, 8)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_targets_that_were_written_are_read_by_the_decoder_compared_and_have_no_labels(family):
    batch = {
        "input_ids": torch.tensor([[10, 11, 1], [20, 1, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([[30, 1], [31, 1]]),
    }
    prompts = Seq2Seq().prompts(batch)
    assert as_lists(prompts) == [[10, 11, 1], [20, 1]]
    task, model = Seq2Seq(), tiny_model(family)
    answers = [torch.tensor([5, 6, 1]), torch.tensor([7, 1])]
    given = task.with_answers(prompts, answers, padding=0, sizes=())
    new = unlabelled(with_decoder_inputs(model, given))
    start = model.config.decoder_start_token_id
    assert new["input_ids"].tolist() == batch["input_ids"].tolist()
    assert new["decoder_input_ids"][0].tolist() == [start, 5, 6] and new["decoder_input_ids"][1, :2].tolist() == [
        start,
        7,
    ]
    assert new["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert new["written"].int().tolist() == [[1, 1, 1], [1, 1, 0]] and (new["labels"] == UNLABELLED).all()
    objective = Objective(TERMS, "seq2seq", one_pair, encoder_maps=one_pair)
    counts = objective.counts([new]).tolist()
    assert counts == [0, 5, 5, 5]  # labels, logits, states of the encoder (5 source tokens) and of the decoder
    assert objective.counts([given]).tolist() == [5, 5, 5, 5]


def test_a_task_without_prompts_gives_none():
    with pytest.raises(NotImplementedError, match="causal_lm is not prompted"):
        CausalLM().prompts({})

"""What is kept of each text with a vector, and the metrics over these."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import tiny_batch, tiny_config
from transformers import AutoModel

from distill.evaluation.metrics import METRICS
from distill.evaluation.predict import predict
from distill.models.forward import Capture, forward
from distill.models.sentence import SentenceHead


def test_the_columns_of_a_pair_are_the_vectors_of_its_texts():
    model, teacher = (AutoModel.from_config(tiny_config("bert", num_hidden_layers=2)).eval() for _ in range(2))
    model.sentence_head = teacher.sentence_head = SentenceHead(("cls",))
    batch = tiny_batch(rows=4) | {"labels": torch.tensor([0, 0, 1, 1]), "texts": torch.tensor([2, 2])}
    batch["examples"] = torch.tensor([9, 8])
    rows = predict(model, [batch], "embedding", lambda given: forward(teacher, given, Capture()))
    with torch.no_grad():
        own, theirs = (each(batch["input_ids"], batch["attention_mask"])[0][:, 0].numpy() for each in (model, teacher))
    assert rows["example"].tolist() == [8, 9]
    np.testing.assert_allclose(rows["embeddings"], own[[2, 0]], atol=1e-6)
    np.testing.assert_allclose(rows["pair_embeddings"], own[[3, 1]], atol=1e-6)
    np.testing.assert_allclose(rows["teacher_embeddings"], theirs[[2, 0]], atol=1e-6)
    cosines = (own * theirs).sum(1) / np.linalg.norm(own, axis=1) / np.linalg.norm(theirs, axis=1)
    assert rows["teacher_cosine"] == pytest.approx([cosines[2:].mean(), cosines[:2].mean()], rel=1e-5)


def angles(*degrees):
    return np.array([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def test_metrics_of_retrieval_follow_from_the_rank_of_each_pair():
    texts, pairs = angles(0, 90, 180), 5 * angles(10, 80, 15)  # own pair: first, first, second
    assert METRICS["mrr_at_10"](texts, pairs) == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert METRICS["ndcg_at_10"](texts, pairs) == pytest.approx((1 + 1 + 1 / math.log2(3)) / 3)
    assert METRICS["recall_at_10"](texts, pairs) == 1
    many = np.concatenate([angles(50), angles(*range(1, 11))])
    alone = np.concatenate([angles(0), angles(*range(1, 11))])
    assert METRICS["recall_at_10"](alone, many) == pytest.approx(10 / 11)  # the first text finds its pair at place 11


def test_a_pair_that_others_equal_comes_last_among_them():
    assert METRICS["mrr_at_10"](angles(0, 0), angles(5, 5)) == 0.5
    assert METRICS["mrr_at_10"](np.zeros((3, 2)), np.zeros((3, 2))) == pytest.approx(1 / 3)  # a model that says nothing


def test_spearman_is_that_of_scipy():
    generator = np.random.default_rng(0)
    left, right = generator.integers(0, 5, 50) / 4, generator.integers(0, 9, 50) / 3
    assert METRICS["spearman"](left, right) == pytest.approx(stats.spearmanr(left, right).statistic)
    assert math.isnan(METRICS["spearman"](np.ones(3), np.arange(3)))


def test_neighbours_are_counted_among_the_ten_nearest_others():
    own = angles(*range(0, 48, 4))
    assert METRICS["neighbours_kept"](own, 3 * own) == 1
    turned = own.copy()
    turned[[0, -1]] = turned[[-1, 0]]  # each of the twelve has one other that is not among its ten
    ten = [set(np.argsort(-(own @ own[k]))[1:11]) for k in range(12)]
    moved = [set([j for j in np.argsort(-(turned @ turned[k])) if j != k][:10]) for k in range(12)]
    expected = np.mean([len(a & b) / 10 for a, b in zip(ten, moved, strict=True)])
    assert METRICS["neighbours_kept"](turned, own) == pytest.approx(expected) and expected < 1
    assert METRICS["neighbours_kept"](angles(0, 90), angles(0, 90)) == 1

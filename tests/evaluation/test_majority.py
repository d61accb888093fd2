"""The most frequent answer of some labels: figures derived by hand, one kind of predictions after the other."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_model

from distill.data import TASKS
from distill.evaluation.chance import DEFINED, most_frequent
from distill.evaluation.metrics import compute
from distill.evaluation.predict import predict
from distill.losses import PREDICTION_KINDS
from distill.recipe.names import NO_MAJORITY


def batch(labels, **more):
    """Examples with these labels, of as many tokens as there are labels in each."""
    labels = torch.tensor(labels)
    ids = torch.ones(len(labels), labels.shape[1] if labels.ndim > 1 else 2, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **more}


def measured(head, train, test, classes, names, vocabulary=None):
    """Metrics of the most frequent answer of the labels `train` on those of `test`."""
    answer = most_frequent([batch(train)], head, classes)
    given = batch(test, examples=torch.arange(len(test)))
    rows = predict(tiny_model("bert"), [given], head, ask=answer, vocabulary=vocabulary)
    return compute(names, rows), rows


def test_of_classes_it_is_the_most_frequent_one():
    # 2 of class 0, 1 of class 1, none of class 2; one row has no label. With one added to each: 3, 2 and 1 of 6.
    found, rows = measured("sequence", [0, 0, 1, -100], [0, 1, 2, 0], 3, ["accuracy", "f1_macro", "loss"])
    assert rows["predictions"].tolist() == [0, 0, 0, 0]
    assert found["accuracy"] == 2 / 4
    assert found["f1_macro"] == pytest.approx((2 * 2 / (4 + 2)) / 3)  # class 0: 2 found of 4 said and 2 true
    assert found["loss"] == pytest.approx(-(2 * math.log(3 / 6) + math.log(2 / 6) + math.log(1 / 6)) / 4)


def test_of_sets_it_is_the_classes_of_more_than_half_of_the_examples():
    # Class 0 in 3 of 4, class 1 in 2 of 4, class 2 in none: with one added, 4/6, 3/6 and 1/6.
    train = [[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0], [-100, -100, -100]]
    found, rows = measured("multi_label", train, [[1, 1, 0], [0, 0, 1]], 3, ["f1_micro", "loss"])
    assert rows["predictions"].tolist() == [[1, 0, 0], [1, 0, 0]]
    assert found["f1_micro"] == pytest.approx(2 * 1 / (2 + 3))
    first = math.log(4 / 6) + math.log(3 / 6) + math.log(5 / 6)
    second = math.log(2 / 6) + math.log(3 / 6) + math.log(1 / 6)
    assert found["loss"] == pytest.approx(-(first + second) / 6)


def test_of_numbers_it_is_the_mean():
    found, rows = measured("regression", [1.0, 2.0, 6.0, -100.0], [3.0, 5.0], 1, ["mse", "rmse", "pearson"])
    assert rows["values"].tolist() == [3, 3]
    assert found["mse"] == 2 and found["rmse"] == pytest.approx(math.sqrt(2)) and math.isnan(found["pearson"])


def test_of_tags_it_is_the_most_frequent_one_of_each_token():
    # Tag 0 three times of four: with one added to each of two, 4/6 and 2/6.
    found, _ = measured("token", [[0, 0], [1, 0]], [[0, 1, -100], [1, 1, 0]], 2, ["token_accuracy", "loss"])
    assert found["token_accuracy"] == 2 / 5
    assert found["loss"] == pytest.approx(-(2 * math.log(4 / 6) + 3 * math.log(2 / 6)) / 5)


@pytest.mark.parametrize(("head", "scored"), [("next_token", [1, 2, 1]), ("masked_token", [1, 1, 2, 1])])
def test_of_a_vocabulary_it_is_how_frequent_each_token_is_and_entries_beyond_it_are_no_tokens(head, scored):
    # Trained on 1 1 1 2, of which the first is predicted by nothing where each token predicts the next.
    seen = [1, 1, 1, 2][head == "next_token" :]
    counts = {token: seen.count(token) + 1 for token in range(4)}
    found, rows = measured(head, [[1, 1, 1, 2]], [[1, 1, 2, 1]], 4, ["perplexity", "token_accuracy"], vocabulary=4)
    nll = -sum(math.log(counts[token] / sum(counts.values())) for token in scored)
    assert rows["nll"][0] == pytest.approx(nll)
    assert found["perplexity"] == pytest.approx(math.exp(nll / len(scored)))
    assert found["token_accuracy"] == scored.count(1) / len(scored)


def test_the_recipe_knows_which_tasks_have_none():
    undefined = {name for name, task in TASKS.items() if task().head not in DEFINED}
    assert undefined == {*NO_MAJORITY} and {*DEFINED} <= PREDICTION_KINDS.keys()

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_batch, tiny_model

from distill.evaluation.arms import arm_row, measured, with_retained
from distill.evaluation.predict import gathered, predict
from distill.losses import Objective
from distill.models.forward import Outputs, forward
from distill.recipe.schema import Term
from distill.teacher import LiveTeacher


def as_teacher(model):
    return lambda batch: Outputs(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)


def test_next_token_columns_agree_with_the_models_own_loss():
    model, batch = tiny_model("llama"), tiny_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    columns = predict(model, [{**batch, "labels": labels}], "next_token")
    with torch.no_grad():
        expected = model(**batch, labels=labels).loss.item()
    assert len(columns["nll"]) == int(batch["attention_mask"].sum()) - 3  # the first token of a row is not predicted
    assert columns["nll"].mean() == pytest.approx(expected, rel=1e-5)


def padded_pair():
    """A student that is its teacher up to the rows of the head beyond 60 tokens, and a batch of those tokens."""
    teacher, student = (tiny_model("llama", tie_word_embeddings=False) for _ in range(2))
    with torch.no_grad():
        student.lm_head.weight[60:] += 3.0 * student.lm_head.weight[:4].sign()
    batch = tiny_batch()
    batch["input_ids"] %= 60
    return student, teacher, {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def test_rows_of_the_head_beyond_the_vocabulary_are_no_prediction_and_no_divergence_as_in_training():
    student, teacher, batch = padded_pair()
    objective = Objective([Term(match="labels"), Term(match="logits")], "next_token", vocabulary=60)
    asked = LiveTeacher(teacher, objective.teacher, torch.device("cpu"))
    counts = objective.counts([batch])
    with torch.no_grad():
        _, sums = objective(forward(student, batch, objective.student), asked(batch), batch, counts)
    assert predict(student, [batch], "next_token", asked)["predictions"].max() >= 60  # what the cut is for
    columns = predict(student, [batch], "next_token", asked, vocabulary=60)
    assert columns["predictions"].max() < 60
    assert (columns["predictions"] == columns["teacher_predictions"]).all()
    means = [columns["nll"].mean(), columns["kl_sum"].mean()]
    assert means == pytest.approx((sums / counts).tolist(), rel=1e-5, abs=1e-7) and means[1] == 0


def test_unlabelled_rows_are_left_out_and_the_rest_agree_with_the_models_own_loss():
    model, batch = tiny_model("bert"), tiny_batch()
    columns = predict(model, [{**batch, "labels": torch.tensor([2, -100, 0])}], "sequence")
    with torch.no_grad():
        logits = model(**batch).logits[[0, 2]]
    assert columns["references"].tolist() == [2, 0]
    assert columns["predictions"].tolist() == logits.argmax(-1).tolist()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([2, 0])).item()
    assert columns["nll"].mean() == pytest.approx(expected, rel=1e-5)


def test_a_model_does_not_diverge_from_itself_and_does_from_another():
    model, batch = tiny_model("bert"), {**tiny_batch(), "labels": torch.tensor([0, 1, 2])}
    same = predict(model, [batch], "sequence", as_teacher(model))
    other = predict(model, [batch], "sequence", as_teacher(tiny_model("bert", seed=1)))
    assert (same["kl_sum"] == 0).all() and (same["predictions"] == same["teacher_predictions"]).all()
    assert (other["kl_sum"] > 0).all()


def test_processes_without_examples_add_nothing_when_gathered():
    columns = {"nll": np.array([1.0, 2.0])}
    assert gathered(columns, lambda own: [*own, {}, {"nll": np.array([3.0])}])["nll"].tolist() == [1.0, 2.0, 3.0]


def test_retained_is_the_share_of_the_teacher_where_more_is_better():
    rows = [arm_row("teacher", 0, {"accuracy": 0.8, "loss": 1.0}), arm_row("cut", 0, {"accuracy": 0.4, "loss": 2.0})]
    teacher, cut = with_retained(rows, ["accuracy", "loss"])
    assert teacher["retained"] == {"accuracy": 1.0} and cut["retained"] == {"accuracy": 0.5}
    assert with_retained(rows[1:], ["accuracy"])[0]["retained"] == {}


def test_a_value_that_json_cannot_hold_is_none_and_keeps_no_share():
    rows = [arm_row("teacher", 0, measured({"accuracy": 0.8})), arm_row("cut", 0, measured({"accuracy": float("nan")}))]
    assert rows[1]["metrics"] == {"accuracy": None}
    assert with_retained(rows, ["accuracy"])[1]["retained"] == {}

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_batch, tiny_model

from distill.evaluation.predict import column_names, merge_rows, predict
from distill.evaluation.recorded_teacher import record_teacher
from distill.losses import Objective
from distill.models.forward import Capture, Outputs, forward
from distill.recipe.schema import Term
from distill.teacher import LiveTeacher

EXAMPLES = {"examples": torch.tensor([5, 7, 6])}


def as_teacher(model):
    return lambda batch: Outputs(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)


def language_batch(seed=0):
    batch = tiny_batch(seed)
    return {**batch, **EXAMPLES, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def class_batch(labels=(0, 1, 2)):
    return {**tiny_batch(), **EXAMPLES, "labels": torch.tensor(labels)}


def test_a_row_of_a_language_model_sums_what_its_own_loss_says_of_that_text():
    model, batch = tiny_model("llama"), language_batch()
    rows = predict(model, [batch], "next_token")
    assert rows["example"].tolist() == [5, 6, 7] and rows["tokens"].tolist() == [9, 7, 8]  # 10, 8 and 9 tokens
    for row, place in enumerate((0, 2, 1)):
        own = {name: tensor[place : place + 1] for name, tensor in batch.items() if name != "examples"}
        with torch.no_grad():
            expected = model(**own)
        assert rows["nll"][row] / rows["tokens"][row] == pytest.approx(expected.loss.item(), rel=1e-5)
        real = own["labels"][0, 1:] != -100
        hits = (expected.logits[0, :-1].argmax(-1) == own["labels"][0, 1:])[real].sum()
        assert rows["correct"][row] == hits
    assert rows.keys() == {"example", "nll", "tokens", "correct"}


def padded_pair():
    """A student that is its teacher up to the rows of the head beyond 60 tokens, and a batch of those tokens."""
    teacher, student = (tiny_model("llama", tie_word_embeddings=False) for _ in range(2))
    with torch.no_grad():
        student.lm_head.weight[60:] += 3.0 * student.lm_head.weight[:4].sign()
    batch = language_batch()
    batch["input_ids"] %= 60
    return student, teacher, {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def test_rows_of_the_head_beyond_the_vocabulary_are_no_prediction_and_no_divergence_as_in_training():
    student, teacher, batch = padded_pair()
    objective = Objective([Term(match="labels"), Term(match="logits")], "next_token", vocabulary=60)
    asked = LiveTeacher(teacher, objective.teacher, torch.device("cpu"))
    counts = objective.counts([batch])
    with torch.no_grad():
        _, sums = objective(forward(student, batch, objective.student), asked(batch), batch, counts)
    uncut = predict(student, [batch], "next_token", asked)
    assert (uncut["agreed"] < uncut["positions"]).any()  # what the cut is for
    rows = predict(student, [batch], "next_token", asked, vocabulary=60)
    assert (rows["agreed"] == rows["positions"]).all() and (rows["kl_sum"] == 0).all()
    assert rows["nll"].sum() == pytest.approx(sums[0].item(), rel=1e-5) and rows["tokens"].sum() == counts[0]


def test_unlabelled_rows_are_left_out_and_the_rest_agree_with_the_models_own_loss():
    model, batch = tiny_model("bert"), class_batch((2, -100, 0))
    rows = predict(model, [batch], "sequence", as_teacher(model))
    with torch.no_grad():
        logits = model(**tiny_batch()).logits[[0, 2]]
    assert rows["example"].tolist() == [5, 6] and rows["references"].tolist() == [2, 0]
    assert rows["predictions"].tolist() == rows["teacher_predictions"].tolist() == logits.argmax(-1).tolist()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([2, 0])).item()
    assert rows["nll"].mean() == pytest.approx(expected, rel=1e-5)
    assert set(rows) == set(column_names("sequence"))


def test_a_set_of_classes_is_a_row_of_choices_and_its_divergence_that_of_each_of_them():
    model, other = tiny_model("bert"), tiny_model("bert", seed=1)
    labels = torch.tensor([[1, 0, 1], [-100, -100, -100], [0, 0, 0]])
    rows = predict(model, [{**tiny_batch(), **EXAMPLES, "labels": labels}], "multi_label", as_teacher(other))
    with torch.no_grad():
        ours, theirs = (each(**tiny_batch()).logits[[0, 2]] for each in (model, other))
    assert rows["references"].tolist() == [[1, 0, 1], [0, 0, 0]] and rows["tokens"].tolist() == [3, 3]
    assert rows["predictions"].tolist() == (ours > 0).long().tolist()
    assert rows["correct"].tolist() == (rows["predictions"] == rows["references"]).sum(1).tolist()
    assert rows["agreed"].tolist() == ((ours > 0) == (theirs > 0)).sum(1).tolist()
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(ours, labels[[0, 2]].float(), reduction="none")
    assert rows["nll"] == pytest.approx(wanted.sum(1).numpy(), rel=1e-5)
    p, q = theirs.sigmoid(), ours.sigmoid()
    by_hand = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert rows["kl_sum"] == pytest.approx(by_hand.sum(1).numpy(), rel=1e-3)
    assert set(rows) == set(column_names("multi_label"))


def test_a_regression_has_numbers_and_no_classes():
    model, other = (tiny_model("bert", seed=seed, num_labels=1) for seed in (0, 1))
    batch = {**tiny_batch(), **EXAMPLES, "labels": torch.tensor([0.5, -100.0, 2.25])}
    rows = predict(model, [batch], "regression", as_teacher(other))
    with torch.no_grad():
        ours, theirs = (each(**tiny_batch()).logits[[0, 2], 0].double().numpy() for each in (model, other))
    assert rows["example"].tolist() == [5, 6] and rows["targets"].tolist() == [0.5, 2.25]
    assert rows["values"] == pytest.approx(ours) and rows["teacher_values"] == pytest.approx(theirs)
    assert set(rows) == set(column_names("regression"))


def test_the_confidence_is_the_probability_of_the_predicted_class():
    model = tiny_model("bert")
    rows = predict(model, [class_batch()], "sequence")
    with torch.no_grad():
        likeliest = model(**tiny_batch()).logits.softmax(-1).amax(-1)[[0, 2, 1]]
    assert rows["confidence"] == pytest.approx(likeliest.numpy(), rel=1e-5)


def test_a_model_does_not_diverge_from_itself_and_does_from_another():
    model, other = tiny_model("bert"), tiny_model("bert", seed=1)
    assert (predict(model, [class_batch()], "sequence", as_teacher(model))["kl_sum"] == 0).all()
    rows = predict(model, [class_batch()], "sequence", as_teacher(other))
    with torch.no_grad():
        student, teacher = (each(**tiny_batch()).logits.log_softmax(-1) for each in (model, other))
    by_hand = (teacher.exp() * (teacher - student)).sum(-1)[[0, 2, 1]]
    assert rows["kl_sum"] == pytest.approx(by_hand.numpy(), rel=1e-4)


def test_rows_come_in_the_order_of_the_split_and_ranks_without_examples_add_nothing():
    parts = [{"example": np.array([4, 0]), "nll": np.array([4.0, 0.0])}, {}, {"example": [2], "nll": [2.0]}]
    merged = merge_rows(parts)
    assert merged["example"].tolist() == [0, 2, 4] and merged["nll"].tolist() == [0.0, 2.0, 4.0]
    assert merge_rows([{}]) == {}


@pytest.mark.parametrize("host_bytes", [2**20, 0])
@pytest.mark.parametrize(("family", "head"), [("llama", "next_token"), ("bert", "sequence")])
def test_a_recorded_teacher_runs_once_per_batch_and_every_arm_gets_what_it_said(family, head, host_bytes, tmp_path):
    batches = [language_batch(seed) | {"examples": EXAMPLES["examples"] + 10 * seed} for seed in range(2)]
    if head == "sequence":
        batches = [batch | {"labels": torch.tensor([0, 1, 2])} for batch in batches]
    teacher, folder = tiny_model(family), tmp_path / "recorded"
    (folder / "left by a killed run").mkdir(parents=True)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    live = LiveTeacher(teacher, Capture(stop_at_head=True), torch.device("cpu"))
    expected = [predict(tiny_model(family, seed=seed), batches, head, live) for seed in (1, 2)]
    calls.clear()
    with record_teacher(live, folder, host_bytes) as recording:
        rows = [predict(tiny_model(family, seed=seed), batches, head, recording) for seed in (1, 2)]
        assert len(list(folder.iterdir())) == (0 if host_bytes else 2)
    assert len(calls) == 2 and not folder.exists()
    for own, other in zip(rows, expected, strict=True):
        assert all((own[name] == other[name]).all() for name in other) and own["kl_sum"].sum() > 0


def test_a_batch_of_several_chunks_gives_the_rows_of_its_texts_one_by_one():
    model, other = (tiny_model("llama", seed=seed) for seed in (0, 1))
    ids = tiny_batch(rows=14, length=60)  # 826 positions; a chunk has 512
    labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    batch = {**ids, "labels": labels, "examples": torch.arange(14)}
    whole = predict(model, [batch], "next_token", as_teacher(other))
    single = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(14)]
    rows = predict(model, single, "next_token", as_teacher(other))
    assert whole["tokens"].sum() > 512
    for name, values in whole.items():
        assert values == pytest.approx(rows[name], rel=1e-5), name

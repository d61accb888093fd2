"""The stage `examine`."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tiny import WORDS, tiny_project
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from distill.errors import InputError
from distill.evaluation.chance import label_counts, weakness, weakness_of_numbers
from distill.pipeline import RunDir, Session, data, examine, run_stages, teacher
from distill.recipe import load_recipe


def session_of(folder, *overrides, **flags):
    lines = []
    return Session(
        load_recipe(folder / "recipe.yaml", overrides), folder, RunDir(folder / "run"), lines.append, **flags
    ), lines


def test_chance_is_guessing_evenly_or_knowing_how_frequent_each_class_is():
    counts = torch.tensor([6, 2, 0])
    prior = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))  # 0.5623
    assert not weakness({"loss": prior - 0.01, "accuracy": 0.1}, counts, 3)
    assert not weakness({"loss": 5.0, "accuracy": 0.76}, counts, 3)  # too sure of itself, and right more often
    assert "75.0%" in weakness({"loss": prior, "accuracy": 0.75}, counts, 3)
    assert "guessing among all 3" in weakness({"loss": math.log(3), "accuracy": 0.75}, counts, 3)
    assert weakness({"loss": math.nan, "accuracy": 0.75}, counts, 3)


def test_labels_are_counted_where_there_are_any():
    batch = {"labels": torch.tensor([[5, 1, 1, 2], [5, 1, -100, -100]])}
    batch["attention_mask"] = (batch["labels"] != -100).long()
    assert label_counts([batch, batch], "next_token").tolist() == [0, 6, 2]  # the first token is not predicted
    assert label_counts([{**batch, "labels": torch.tensor([2, -100])}], "sequence").tolist() == [0, 0, 1]


def test_a_teacher_that_is_no_better_than_chance_is_refused_before_it_teaches(tmp_path):
    tiny_project(tmp_path)
    stages = [data.STAGE, teacher.STAGE, examine.STAGE]
    weak = ["teacher.fit.steps=1", "teacher.fit.lr=1e-9"]
    session, lines = session_of(tmp_path, *weak)
    run_stages(session, stages)
    assert any("too few to be sure" in line for line in lines)
    weak += ["data.test_share=0.7", "training.evaluate_every=0"]
    session, lines = session_of(tmp_path, *weak)
    with pytest.raises(InputError, match=r"no better than chance.*--accept-weak-teacher"):
        run_stages(session, stages)
    assert any("the teacher on" in line and "accuracy" in line for line in lines)
    session, lines = session_of(tmp_path, *weak, accept_weak_teacher=True)
    run_stages(session, stages)
    assert any("going on, as asked" in line for line in lines)
    assert json.loads(session.folder.examined.read_text())["weakness"]
    session, lines = session_of(tmp_path, "teacher.fit.steps=60", "data.labelled=null")
    run_stages(session, stages)
    found = json.loads(session.folder.examined.read_text())
    assert found["weakness"] == "" and found["metrics"]["accuracy"] > 0.6


def test_numbers_must_come_nearer_to_the_labels_than_their_mean_or_rise_with_them():
    targets = np.array([1.0, 2.0, 3.0, 6.0])  # mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5
    assert weakness_of_numbers(np.array([2.0, 3.0, 3.0, 4.0]), targets) == ""  # errors 1, 1, 0, 4: 1.5
    assert weakness_of_numbers(np.full(4, 3.0), targets).endswith(
        "of 3.5 is no less than that of saying their mean each time, 3.5"
    )
    assert "of 13 is no less" in weakness_of_numbers(targets[::-1], targets)  # errors 5, 1, 1, 5: 52 / 4
    more = np.tile(targets, 2)
    assert weakness_of_numbers(more / 100, more) == ""  # another scale: a correlation of 1, where chance gives 0.35


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        (
            lambda i: {"text": f"{WORDS[i % 13]} {WORDS[i // 13]}", "label": i % 9 / 2},
            ["losses.1.loss=logit_mse"],
            "mean squared error of .* is no less than",
        ),
        (
            lambda i: {"question": "red", "context": f"{WORDS[i % 13]} {WORDS[i // 13]}", "answers": WORDS[i // 13]},
            ["data.task=question_answering", "losses.1.loss=forward_kl"],
            "is no less than that of",
        ),
    ],
)
def test_a_teacher_of_numbers_or_of_answers_must_know_something_too(tmp_path, row, settings, words):
    path = tiny_project(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save_pretrained(tmp_path / "teacher")
    (path.parent / "data.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(169)))
    settings += ["data.labelled=null", "data.test_share=0.7", "training.evaluate_every=0", "teacher.fit.steps=1"]
    session, _ = session_of(tmp_path, *settings, "teacher.fit.lr=1e-9")
    with pytest.raises(InputError, match=f"no better than chance.*{words}"):
        run_stages(session, [data.STAGE, teacher.STAGE, examine.STAGE])

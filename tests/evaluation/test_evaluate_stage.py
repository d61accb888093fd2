"""The stage on a language model: a head padded beyond the tokenizer, and metrics that the task does not have."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from tiny import RECIPE, tiny_model, tiny_project

from distill.data import evaluation_batches
from distill.errors import InputError
from distill.evaluation.predict import predict
from distill.files import write_json
from distill.pipeline import run_stages
from distill.pipeline.data import STAGE as prepared
from distill.pipeline.data import work as prepare_data
from distill.pipeline.evaluate import STAGE as evaluate_stage
from distill.pipeline.evaluate import work as evaluate
from distill.pipeline.folder import RunDir
from distill.pipeline.session import Session
from distill.pipeline.train import measure_held_out, save_model
from distill.recipe import load_recipe

LM = RECIPE.replace("task: classification, labelled: 24,", "task: causal_lm,")
SETTINGS = ["teacher.init=pretrained", "teacher.fit=null", "evaluation.arms=[teacher, distilled]"]


@pytest.fixture
def session(tmp_path):
    recipe = tiny_project(tmp_path, LM, family="llama")
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "teacher")
    loaded = load_recipe(recipe, [*SETTINGS, "evaluation.efficiency=false"])
    return Session(loaded, tmp_path, RunDir(tmp_path / "run"), say=lambda _text: None)


def test_what_a_padded_head_says_beyond_the_vocabulary_is_no_prediction(session):
    prepare_data(session)
    assert session.vocabulary == 17
    teacher, student = (tiny_model("llama", tie_word_embeddings=False) for _ in range(2))
    with torch.no_grad():
        student.lm_head.weight[17:] *= 3
    teacher.save_pretrained(session.teacher)
    save_model(session, student, session.folder.distilled)
    write_json(session.folder.examined, {"split": "test", "examples": 1, "metrics": {}, "weakness": ""})
    evaluate(session)
    arms = {arm["name"]: arm["metrics"] for arm in json.loads(session.folder.evaluation.read_text())["arms"]}
    assert arms["distilled"]["kl"] == 0 and arms["distilled"]["agreement"] == 1
    assert arms["distilled"]["token_accuracy"] == arms["teacher"]["token_accuracy"] > 0
    splits = session.corpus.splits
    vars(session)["corpus"] = replace(session.corpus, splits={**splits, "validation": splits["test"]})
    in_training = measure_held_out(session, student, lambda: False)
    assert in_training == pytest.approx({name: arms["distilled"][name] for name in in_training})
    assert "token_accuracy" in in_training
    table = json.loads(session.folder.evaluation.read_text())
    assert table["precision"] == {"teacher": "float32", "students": "float32", "released": None}


def test_figures_in_bf16_stand_beside_those_of_the_released_weights(session):
    training = session.recipe.training.model_copy(update={"precision": "bf16"})
    session = replace(session, recipe=session.recipe.model_copy(update={"training": training}))
    prepare_data(session)
    student = tiny_model("llama", seed=1)
    save_model(session, student, session.folder.distilled)
    write_json(session.folder.examined, {"split": "test", "examples": 1, "metrics": {}, "weakness": ""})
    evaluate(session)
    table = json.loads(session.folder.evaluation.read_text())
    found = table["precision"]
    assert found["teacher"] == found["students"] == "bf16 autocast over float32 weights"
    corpus, released = session.corpus, found["released"]
    assert released["dtype"] == "float32" and released["examples"] == len(corpus.test)
    arms = {arm["name"]: arm["metrics"] for arm in table["arms"]}
    assert released["as_evaluated"]["perplexity"] == pytest.approx(arms["distilled"]["perplexity"], rel=1e-9)
    rows = predict(student, evaluation_batches(corpus, corpus.test, 16), corpus.head, vocabulary=session.vocabulary)
    exact = math.exp(rows["nll"].sum() / rows["tokens"].sum())
    assert released["metrics"]["perplexity"] == pytest.approx(exact, rel=1e-9)
    assert arms["distilled"]["perplexity"] != released["metrics"]["perplexity"]


def own_metric(predictions, references):
    raise AssertionError("never computed")


def test_a_metric_of_ones_own_that_the_task_has_no_columns_for_is_refused_before_anything_is_done(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "theirs", sys.modules[__name__])
    metrics = "evaluation.metrics=[perplexity, 'theirs:own_metric']"
    recipe = load_recipe(tiny_project(tmp_path, LM, family="llama"), [metrics])
    session = Session(recipe, tmp_path, RunDir(tmp_path / "run"), say=lambda _text: None)
    with pytest.raises(InputError, match="'theirs:own_metric' needs the columns predictions, references"):
        run_stages(session, [prepared, evaluate_stage])
    assert not session.folder.evaluation.exists()


def test_another_name_of_the_data_and_an_equal_row_more_are_written_down_anew(session):
    prepare_data(session)
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(session.folder.distilled)
    inputs = evaluate_stage.inputs(session)
    renamed = session.recipe.with_paths(lambda path: path.replace("data", "rows"))
    assert evaluate_stage.inputs(replace(session, recipe=renamed))["data"]["source"] == "./rows.jsonl"
    more = replace(session.corpus, summary={**session.corpus.summary, "train": {"rows": {"equal": 1}}})
    vars(session)["corpus"] = more
    assert evaluate_stage.inputs(session)["data"] != inputs["data"]

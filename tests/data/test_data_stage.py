"""The stage `data`: what runs it anew, what it refuses, and that nothing else reads texts."""

from __future__ import annotations

import json
import os

import pytest
from tiny import RECIPE, tiny_config, tiny_project

from distill.errors import InputError
from distill.pipeline import RunDir, Session, run_stages
from distill.pipeline import data as stage
from distill.pipeline import train as training
from distill.recipe import load_recipe

TRAINED = RECIPE.replace("  init: random\n", "").replace(
    "  fit: {steps: 12, batch_size: 8, micro_batch_size: 4, lr: 3e-3, save_every: 4}\n", ""
)


def session_of(folder, *overrides):
    lines = []
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    return Session(recipe, folder, RunDir(folder / "run"), lines.append), lines


def prepared(folder, *overrides):
    """The corpus, and whether it was made anew."""
    session, lines = session_of(folder, *overrides)
    run_stages(session, [stage.STAGE])
    return session.corpus, "data: unchanged, skipped" not in lines


def test_a_finished_corpus_is_read_and_not_made_again(tmp_path):
    tiny_project(tmp_path)
    first, made = prepared(tmp_path)
    file = tmp_path / "run/data/corpus.safetensors"
    before = file.stat()
    second, again = prepared(tmp_path, "training.lr=1e-5")
    assert (made, again) == (True, False)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert first.fingerprint == second.fingerprint


def test_an_edited_file_with_its_old_time_is_noticed(tmp_path):
    tiny_project(tmp_path)
    path = tmp_path / "data.jsonl"
    first, _ = prepared(tmp_path)
    old = path.stat()
    path.write_text(path.read_text().replace("swimmer", "sw1mmer"))  # as many bytes
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    second, made = prepared(tmp_path)
    assert made and "sw1mmer" in second.classes and "swimmer" in first.classes


@pytest.mark.parametrize(
    "override", ["data.max_length=8", "data.labelled=20", "data.test_share=0.4", "seed=5", "data.limit=100"]
)
def test_whatever_decides_the_corpus_makes_it_anew(tmp_path, override):
    tiny_project(tmp_path)
    first, _ = prepared(tmp_path)
    second, made = prepared(tmp_path, override)
    assert made and first.fingerprint != second.fingerprint


def test_another_tokenizer_makes_the_corpus_anew(tmp_path):
    tiny_project(tmp_path)
    first, _ = prepared(tmp_path)
    path = tmp_path / "teacher/tokenizer.json"
    path.write_text(path.read_text().replace('"red": 4', '"red": 5').replace('"green": 5', '"green": 4'))
    second, made = prepared(tmp_path)
    assert made and first.fingerprint != second.fingerprint


def test_a_trained_teacher_keeps_its_order_of_classes_and_unknown_ones_are_refused(tmp_path):
    tiny_project(tmp_path, TRAINED)
    names = {0: "swimmer", 1: "none", 2: "mammal"}
    tiny_config("bert", pad_token_id=0, id2label=names).save_pretrained(tmp_path / "teacher")
    corpus, _ = prepared(tmp_path)
    assert corpus.classes == ("swimmer", "none", "mammal")
    texts = dict(json.loads(line).values() for line in (tmp_path / "data.jsonl").read_text().splitlines())
    session, _ = session_of(tmp_path)
    spelt = session.tokenizer.batch_decode([tokens.tolist() for tokens in corpus.test])
    assert [corpus.classes[label] for label in corpus.test.labels] == [texts[text] for text in spelt]
    tiny_config("bert", pad_token_id=0, id2label={0: "swimmer", 1: "none"}).save_pretrained(tmp_path / "teacher")
    with pytest.raises(InputError, match="has the classes mammal, the teacher knows swimmer, none"):
        prepared(tmp_path)


def test_tokens_beyond_the_embeddings_are_refused_by_name(tmp_path):
    tiny_project(tmp_path)
    tiny_config("bert", pad_token_id=0, vocab_size=16).save_pretrained(tmp_path / "teacher")
    with pytest.raises(InputError, match="the token 'there' with id 16, and the model has 16 embeddings"):
        prepared(tmp_path)


def test_labels_are_asked_for_after_the_data_also_when_a_later_command_needs_them(tmp_path):
    tiny_project(tmp_path)
    path = tmp_path / "data.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    corpus, _ = prepared(tmp_path, "data.labelled=null")
    session, _ = session_of(tmp_path)
    decode = session.tokenizer.decode
    test = {decode(tokens.tolist()) for tokens in corpus.test}
    for row in rows:
        row["label"] = row["label"] if row["text"] in test else None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # where the data are prepared, and where they are unchanged
        session, lines = session_of(tmp_path, "data.labelled=null")
        with pytest.raises(InputError, match=r"no training example has a label.*teacher\.fit"):
            run_stages(session, [stage.STAGE], [stage.STAGE, training.STAGE])
    assert "data: unchanged, skipped" in lines

"""The stage `data`: what runs it anew, what it refuses, and that nothing else reads texts."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time

import datasets
import pytest
from spans import spans_project
from tiny import RECIPE, tiny_config, tiny_project
from transformers import AutoModelForSequenceClassification

from distill.errors import InputError, RecipeError
from distill.pipeline import RunDir, Session, local_inputs, run_stages
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
    (tmp_path / "data.jsonl").touch()
    file = tmp_path / "run/data/train.arrow"
    before = file.stat()
    second, again = prepared(tmp_path, "training.lr=1e-5")
    assert (made, again) == (True, False)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert first.fingerprint == second.fingerprint


def test_splits_of_a_dataset_that_nobody_reads_are_counted(tmp_path):
    tiny_project(tmp_path)
    rows = datasets.Dataset.from_json(str(tmp_path / "data.jsonl"))
    parts = {"train": range(100), "test": range(100, 140), "dev": range(140, 150)}
    datasets.DatasetDict({name: rows.select(own) for name, own in parts.items()}).save_to_disk(tmp_path / "saved")
    left = []
    for own in ("{source: ./saved}", "{source: ./saved, test: {source: ./saved, split: test}}"):
        session, lines = session_of(
            tmp_path, f"data={own[:-1]}, task: classification, contradictions: keep, max_length: 16" + "}"
        )
        run_stages(session, [stage.STAGE])
        left.append([line for line in lines if "not read" in line])
    assert left[0] == ["  train: splits of saved that are not read (dev, test): 2"]
    assert left[1] == ["  train: splits of saved that are not read (dev): 1"]


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


def _classifier(names):
    return AutoModelForSequenceClassification.from_config(tiny_config("bert", pad_token_id=0, id2label=names))


def test_a_trained_teacher_keeps_its_order_of_classes_and_unknown_ones_are_refused(tmp_path):
    tiny_project(tmp_path, TRAINED)
    names = {0: "swimmer", 1: "none", 2: "mammal"}
    _classifier(names).save_pretrained(tmp_path / "teacher")
    corpus, _ = prepared(tmp_path)
    assert corpus.classes == ("swimmer", "none", "mammal")
    texts = dict(json.loads(line).values() for line in (tmp_path / "data.jsonl").read_text().splitlines())
    session, _ = session_of(tmp_path)
    spelt = session.tokenizer.batch_decode([corpus.test[index].tolist() for index in range(len(corpus.test))])
    labels = corpus.test.take(range(len(spelt)))["label"]
    assert [corpus.classes[label] for label in labels] == [texts[text] for text in spelt]
    _classifier({0: "swimmer", 1: "none"}).save_pretrained(tmp_path / "teacher")
    with pytest.raises(InputError, match="has the classes mammal, the teacher knows swimmer, none"):
        prepared(tmp_path)


def test_tokens_beyond_the_embeddings_are_refused_by_name(tmp_path):
    tiny_project(tmp_path)
    tiny_config("bert", pad_token_id=0, vocab_size=16).save_pretrained(tmp_path / "teacher")
    with pytest.raises(RecipeError, match=r"words up to id 16, and config\.json says vocab_size 16"):
        prepared(tmp_path)


@pytest.mark.parametrize(("text", "words"), [("red cat", "0"), ("red [CLS] cat", "0 or 1")])
def test_an_encoder_decoder_with_classes_needs_as_many_ends_in_every_text(text, words, tmp_path):
    tiny_project(tmp_path, family="bart")  # whose end token is the second one of the tokenizer, [CLS], never written
    rows = [{"text": f"{text} {'fast ' * count}", "label": "a"} for count in range(10)]
    with (tmp_path / "data.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with pytest.raises(InputError, match=rf"wants as many in every text; .* there are {words}:"):
        prepared(tmp_path, "data.labelled=null")


def test_second_texts_need_a_model_that_tells_them_apart(tmp_path):
    recipe = RECIPE.replace("source: ./data.jsonl", "source: ./data.jsonl, columns: {pair: text}")
    spans_project(tmp_path, [], recipe.replace("labelled: 24, ", "").replace("pair: text", "pair: second"))
    tiny_config("bert", pad_token_id=0, type_vocab_size=1).save_pretrained(tmp_path / "teacher")
    rows = [{"text": f"red one {'two ' * n}", "second": "cat", "label": "ab"[n % 2]} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"writes 2 token_type_ids, and config\.json says type_vocab_size 1"):
        prepared(tmp_path)


def test_texts_that_hold_special_tokens_are_counted(tmp_path):
    tiny_project(tmp_path)
    with (tmp_path / "data.jsonl").open("a") as file:
        file.writelines(json.dumps({"text": f"red [SEP] {word}", "label": "none"}) + "\n" for word in ("a", "b", "c"))
    corpus, _ = prepared(tmp_path)
    notes = [own["notes"] for own in corpus.summary.values()]
    assert sum(own.get("texts with the special token '[SEP]' in them", 0) for own in notes) == 3


def test_labels_are_asked_for_after_the_data_also_when_a_later_command_needs_them(tmp_path):
    tiny_project(tmp_path)
    path = tmp_path / "data.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    corpus, _ = prepared(tmp_path, "data.labelled=null")
    session, _ = session_of(tmp_path)
    decode = session.tokenizer.decode
    test = {decode(corpus.test[index].tolist()) for index in range(len(corpus.test))}
    for row in rows:
        row["label"] = row["label"] if row["text"] in test else None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # where the data are prepared, and where they are unchanged
        session, lines = session_of(tmp_path, "data.labelled=null", "training.evaluate_every=0")
        with pytest.raises(InputError, match=r"no training example has a label.*teacher\.fit"):
            run_stages(session, [stage.STAGE], [stage.STAGE, training.STAGE])
    assert "data: unchanged, skipped" in lines


def entry_of(cache):
    """The newest corpus in the cache."""
    return max((cache / "data").glob("*/corpus.json"), key=lambda path: path.stat().st_mtime_ns).parent


def test_another_run_takes_the_same_corpus_from_the_cache(tmp_path, monkeypatch):
    tiny_project(tmp_path)
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    first, _ = prepared(tmp_path)
    recipe = load_recipe(tmp_path / "recipe.yaml", ["training.lr=1e-5"])
    lines = []
    session = Session(recipe, tmp_path, RunDir(tmp_path / "other"), lines.append)
    run_stages(session, [stage.STAGE])
    assert any("from the cache" in line for line in lines) and session.corpus.fingerprint == first.fingerprint
    files = [folder / "data/train.arrow" for folder in (tmp_path / "run", tmp_path / "other")]
    assert os.path.samefile(*files)
    assert (tmp_path / "cache/data").stat().st_mode & 0o777 == 0o700
    assert not [*(tmp_path / "cache").rglob("*.rows")]


def test_the_cache_lies_where_the_environment_says(tmp_path, monkeypatch):
    tiny_project(tmp_path)
    monkeypatch.delenv("DISTILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    prepared(tmp_path)
    assert (entry_of(tmp_path / "home/distill") / "train.arrow").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="file/data cannot be the cache: Not a directory; set DISTILL_CACHE"):
        prepared(tmp_path, "data.max_length=12")


@pytest.mark.parametrize("damage", ["cut", "changed", "without facts", "odd facts", "gone", "no folder"])
def test_a_damaged_entry_of_the_cache_is_made_anew(damage, tmp_path, monkeypatch):
    tiny_project(tmp_path)
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    first, _ = prepared(tmp_path)
    entry, before = entry_of(tmp_path / "cache"), (tmp_path / "run/data/train.arrow").read_bytes()
    shutil.rmtree(tmp_path / "run")
    file, content = entry / "train.arrow", bytearray(before)
    file.unlink()
    content[len(content) // 2] ^= 1
    if damage in ("cut", "changed", "without facts", "odd facts"):
        file.write_bytes(before[:-1000] if damage == "cut" else content if damage == "changed" else before)
    if damage == "without facts":
        (entry / "corpus.json").unlink()
    if damage == "odd facts":
        (entry / "corpus.json").write_text('{"files": [1], "settled": {"classes": []}}')
    if damage == "no folder":
        shutil.rmtree(entry)
    session, lines = session_of(tmp_path)
    run_stages(session, [stage.STAGE])
    assert session.corpus.fingerprint == first.fingerprint
    assert (tmp_path / "run/data/train.arrow").read_bytes() == before == file.read_bytes()
    assert any("the cache is damaged, made anew" in line for line in lines) == (damage != "no folder")


def test_what_a_killed_run_left_in_the_cache_is_swept(tmp_path, monkeypatch):
    tiny_project(tmp_path)
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    first, _ = prepared(tmp_path)
    entry = entry_of(tmp_path / "cache")
    shutil.rmtree(tmp_path / "run")
    shutil.move(entry, half := entry.with_name(f".{entry.name}.tmp"))
    (half / "test.arrow").unlink()
    again, _ = prepared(tmp_path)
    assert again.fingerprint == first.fingerprint and not half.exists() and entry.exists()


def test_two_runs_at_once_prepare_the_same_data_once(tmp_path, monkeypatch):
    tiny_project(tmp_path)
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    prepared(tmp_path)
    entry = entry_of(tmp_path / "cache")
    lines, holding = [], threading.Event()

    def other_run():
        with stage._cached(entry.name, print):
            holding.set()
            while not lines:
                time.sleep(0.01)

    holder = threading.Thread(target=other_run)
    holder.start()
    holding.wait()
    with stage._cached(entry.name, lines.append) as cache:
        assert cache == entry and lines == ["  another run prepares the same data; waiting for it"]
    holder.join()


def test_a_stage_with_nothing_to_do_opens_no_text(tmp_path, monkeypatch):
    tiny_project(tmp_path)
    prepared(tmp_path)
    monkeypatch.setattr("distill.data.rows.read_source", None)
    monkeypatch.setattr(stage, "load_corpus", None)
    session, lines = session_of(tmp_path)
    run_stages(session, [stage.STAGE])
    assert lines == ["data: unchanged, skipped"]


def test_no_progress_bar_is_drawn_where_nobody_looks(tmp_path, capfd):
    tiny_project(tmp_path)
    prepared(tmp_path, "data.max_length=11")
    assert capfd.readouterr() == ("", "")


def test_what_became_of_the_rows_is_said_and_kept(tmp_path):
    tiny_project(tmp_path)
    path = tmp_path / "data.jsonl"
    rows = path.read_text()
    some = "".join(rows.splitlines(keepends=True)[:10])
    path.write_text(rows + some + '{"text": " ", "label": "none"}\n{"text": "red wolf", "label": ""}\n')
    session, lines = session_of(tmp_path, "data.labelled=null", "data.max_length=6", "evaluation.arms=[teacher, cut]")
    run_stages(session, [stage.STAGE])
    count, own = rows.count("\n") + 12, session.corpus.summary["train"]
    assert own["rows"] == {"read": count, "empty": 1, "equal": 10}
    said = "\n".join(lines)
    assert f"train: {count} rows read (1 empty, 10 equal); {own['examples']} examples" in said
    assert f", {own['truncated']} cut" in said and own["truncated"] > 50
    assert f"only {len(session.corpus.test)} test examples: differences of a few points are chance" in said
    for name in ("train", "test"):
        counts = session.corpus.summary[name]["classes"]
        assert sum(counts.values()) == session.corpus.summary[name]["labelled"]
        assert f"  {name}: mammal {counts['mammal']}, none {counts['none']}, swimmer {counts['swimmer']}" in said


def test_a_glob_cannot_read_the_run_and_a_folder_cannot_hold_it(tmp_path):
    tiny_project(tmp_path)
    (tmp_path / "texts").mkdir()
    shutil.copy(tmp_path / "data.jsonl", tmp_path / "texts")
    for source, out in (("./**/*.jsonl", "run"), ("./texts", "texts/run"), ("./d*.jsonl", "data.jsonl")):
        recipe = load_recipe(tmp_path / "recipe.yaml", [f"data.source={source}"])
        with pytest.raises(InputError, match=r"--out: the run folder .* data\.source"):
            RunDir(tmp_path / out).check(local_inputs(recipe, tmp_path))
    recipe = load_recipe(tmp_path / "recipe.yaml", ["data.source=./*.jsonl"])
    RunDir(tmp_path / "run").check(local_inputs(recipe, tmp_path))

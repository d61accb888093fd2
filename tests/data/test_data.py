from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_project
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from distill.data import TrainingBatches, collate, evaluation_batches, load_corpus, read_texts, save_corpus, tokenise
from distill.data.batches import micro_batches, step_indices
from distill.data.sources import pydoc_topics, read_rows, source_fingerprint, stdlib_docstrings
from distill.data.tasks import encode_packed
from distill.errors import InputError
from distill.models.load import load_tokenizer
from distill.recipe import load_recipe
from distill.recipe.locate import data_file


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    recipe = load_recipe(tiny_project(folder))
    return folder, recipe.data, load_tokenizer(folder / "teacher")


def corpus_of(project, seed=0, **changes):
    folder, spec, tokenizer = project
    spec = spec.model_copy(update=changes)
    return tokenise(read_texts(spec, seed, folder), spec, tokenizer)


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 5))
def test_each_epoch_visits_every_example_exactly_once(size, batch, seed):
    pool = list(range(100, 100 + size))
    steps = -(-3 * size // batch)
    seen = [index for step in range(steps) for index in step_indices(pool, batch, seed, step)]
    for epoch in range(3):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == pool


@given(st.integers(1, 4), st.integers(0, 30), st.integers(0, 9))
def test_a_step_is_the_same_whenever_and_wherever_it_is_asked_for(world, start, seed):
    pool = list(range(17))
    assert step_indices(pool, 8, seed, start) == step_indices(list(pool), 8, seed, start)
    groups = micro_batches(step_indices(pool, 8, seed, start), np.arange(17) % 5, 2)
    shared = [group for rank in range(world) for group in groups[rank::world]]
    assert sorted(map(sorted, shared)) == sorted(map(sorted, groups))


def test_a_resumed_stream_continues_where_it_stopped_and_processes_share_it(project):
    corpus = corpus_of(project)
    batches = TrainingBatches(corpus, range(len(corpus.train)), 8, 2, seed=1)
    whole = list(batches.stream(0, 6, 0, 1))
    resumed = list(batches.stream(4, 6, 0, 1))
    shared = [list(batches.stream(0, 6, rank, 2)) for rank in (0, 1)]
    for step in range(6):
        numbered = dict(whole[step])
        assert sorted(numbered) == [0, 1, 2, 3]
        parts = dict(shared[0][step]) | dict(shared[1][step])
        for number, batch in numbered.items():
            assert all(torch.equal(batch[name], parts[number][name]) for name in batch)
            if step >= 4:
                assert all(torch.equal(batch[name], dict(resumed[step - 4])[number][name]) for name in batch)


def test_the_split_and_the_labels_do_not_depend_on_the_order_of_the_file(project, tmp_path):
    folder, spec, tokenizer = project
    lines = (folder / "data.jsonl").read_text().splitlines()
    (tmp_path / "data.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    first = corpus_of(project)
    second = tokenise(read_texts(spec, 0, tmp_path), spec, tokenizer)
    assert first.fingerprint == second.fingerprint
    assert not {tuple(t) for t in first.train} & {tuple(t) for t in first.test}


def test_few_labels_are_chosen_by_the_seed_and_the_rest_stay_as_unlabelled_text(project):
    one, again, other = corpus_of(project, 0), corpus_of(project, 0), corpus_of(project, 1)
    all_ = corpus_of(project, 0, labelled=None)
    assert len(one.labelled) == 24 and one.labelled == again.labelled != other.labelled
    assert len(one.train) == len(all_.train) and len(all_.labelled) == len(all_.train)
    assert (one.test.labels != -100).all()
    with pytest.raises(InputError, match="labels asked"):
        corpus_of(project, labelled=10_000)


def test_every_test_example_is_seen_once_by_any_number_of_processes(project):
    corpus = corpus_of(project)
    for world in (1, 2, 3):
        rows = [batch for rank in range(world) for batch in evaluation_batches(corpus, corpus.test, 4, rank, world)]
        pairs = [pair for b in rows for pair in zip(b["input_ids"], b["attention_mask"], strict=True)]
        seen = sorted(tuple(ids[mask.bool()].tolist()) for ids, mask in pairs)
        assert seen == sorted(tuple(tokens.tolist()) for tokens in corpus.test)


def test_collate_pads_right_and_hides_padding(project):
    corpus = corpus_of(project)
    order = sorted(range(len(corpus.train)), key=lambda index: len(corpus.train[index]))
    batch = collate(corpus, corpus.train, [order[0], order[-1]])
    lengths = [len(corpus.train[index]) for index in (order[0], order[-1])]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert batch["input_ids"].shape == (2, lengths[1])


def test_packing_loses_nothing_but_the_last_short_block(project):
    tokenizer = project[2]
    blocks = encode_packed(["red cat", "blue fish runs"], tokenizer, 3)
    end = tokenizer.eos_token_id
    ids = tokenizer(["red cat", "blue fish runs"], add_special_tokens=False)["input_ids"]
    assert [block.tolist() for block in blocks] == [[*ids[0], end], ids[1]]


BOTH, NO_END, ONE = ("<s>", "</s>"), ("<s>", None), ("|", "|")


@pytest.mark.parametrize(
    ("names", "written", "stream"),
    [
        (BOTH, "$A", "red cat </s> <s> red </s> cat </s>"),
        (BOTH, "<s> $A", "<s> red cat </s> <s> red </s> <s> cat </s>"),
        (BOTH, "<s> $A </s>", "<s> red cat </s> <s> red </s> <s> cat </s>"),
        (BOTH, "$A </s>", "red cat </s> <s> red </s> cat </s>"),
        (NO_END, "$A", "red cat <s> red"),
        (NO_END, "<s> $A", "<s> red cat <s> red"),
        (ONE, "$A", "red cat | red | cat |"),
        (ONE, "| $A", "| red cat | red | cat |"),
        (ONE, "| $A |", "| red cat | red | cat |"),
    ],
)
def test_texts_stand_in_the_stream_as_the_tokenizer_writes_them_with_one_end_each(names, written, stream):
    start, end = names
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["red", "cat", *sorted({start, end or start})])}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ids = [(token, words.token_to_id(token)) for token in {start, end or start}]
    words.post_processor = processors.TemplateProcessing(single=written, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=start, eos_token=end)
    texts = ["red cat", f"{start} red", *([f"cat {end}"] if end else [])]  # some texts bring a token of their own
    ids = np.concatenate(encode_packed(texts, tokenizer, 1)).tolist()
    assert " ".join(tokenizer.convert_ids_to_tokens(ids)) == stream


def test_a_corpus_is_the_same_from_its_file_and_stays_there(project, tmp_path):
    corpus = corpus_of(project)
    save_corpus(corpus, tmp_path / "corpus.safetensors")
    read = load_corpus(tmp_path / "corpus.safetensors", corpus.task)
    assert (read.classes, read.padding, read.fingerprint) == (corpus.classes, corpus.padding, corpus.fingerprint)
    for split in ("train", "test"):
        one, other = getattr(corpus, split), getattr(read, split)
        assert [tokens.tolist() for tokens in one] == [tokens.tolist() for tokens in other]
        assert one.labels.tolist() == other.labels.tolist() and one.lengths.tolist() == other.lengths.tolist()
    assert list(read.labelled) == list(corpus.labelled)
    assert str(tmp_path / "corpus.safetensors") in Path("/proc/self/maps").read_text()
    (tmp_path / "corpus.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="is not a tokenised corpus"):
        load_corpus(tmp_path / "corpus.safetensors", corpus.task)


def test_a_file_is_read_without_a_cache_of_other_times(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    path, before = tmp_path / "a.jsonl", None
    for word in ("red", "blu"):
        path.write_text(json.dumps({"text": word, "label": "x"}) + "\n")
        before = before or path.stat()
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert read_rows(path, "text", "label")["text"][:] == [word]
    assert not (tmp_path / "home").exists()


def rows():
    """A source of the user's own, which counts its calls."""
    import datasets

    return datasets.Dataset.from_dict({"text": ["a", Path(os.environ["OWN_TEXT"]).read_text()], "label": ["x", None]})


def test_what_a_source_is_made_from_is_its_content(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("one")
    monkeypatch.setenv("OWN_TEXT", str(path))
    names = ("./a.jsonl", "test_data:rows", "pydoc-topics")
    before = [source_fingerprint(name, tmp_path) for name in names]
    assert [source_fingerprint(name, tmp_path) for name in names] == before
    old = path.stat()
    path.write_text("two")
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    after = [source_fingerprint(name, tmp_path) for name in names]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, False, True]


def test_a_tokenizer_that_raises_gives_one_message(project):
    folder, spec, _ = project
    words = Tokenizer(models.WordLevel({"red": 0}))  # no token for unknown words
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="red", model_max_length=64)
    with pytest.raises(InputError, match="the tokenizer cannot read the train split"):
        tokenise(read_texts(spec, 0, folder), spec, tokenizer)


def test_built_in_sources_have_text_and_labels():
    docstrings = stdlib_docstrings()
    assert len(docstrings) > 2000 and len(set(docstrings["label"])) == 12
    assert len(set(docstrings["text"])) == len(docstrings)
    assert sum(map(len, pydoc_topics()["text"])) > 400_000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "cannot read"),
        ("a.jsonl", '{"body": "a"}\n', "no column 'text'"),
        ("a.jsonl", '{"text": null}\n{"text": "b"}\n', "row 1"),
        ("a.xml", "<a/>", "known endings"),
        ("missing.csv", None, "there is no file"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=words) as caught:
        read_rows(data_file(f"./{name}", tmp_path), "text", "label")
    assert name in str(caught.value)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_files_are_read_with_unlabelled_rows(tmp_path, suffix):
    import datasets

    rows = datasets.Dataset.from_dict({"body": ["one", "two"], "kind": ["x", None]})
    path = tmp_path / f"a.{suffix}"
    getattr(rows, {"jsonl": "to_json", "csv": "to_csv", "parquet": "to_parquet"}[suffix])(path)
    read = read_rows(path, "body", "kind")
    assert read["text"][:] == ["one", "two"] and read["label"][:] == ["x", None]


def test_a_task_needs_two_classes_and_a_labelled_test_split(project, tmp_path):
    _, spec, _ = project
    rows = [json.dumps({"text": f"word {i}", "label": "only"}) for i in range(50)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    with pytest.raises(InputError, match="two or more classes"):
        read_texts(spec.model_copy(update={"labelled": None}), 0, tmp_path)
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": f"word {i}", "label": ""}) for i in range(50)))
    with pytest.raises(InputError, match="has a label"):
        read_texts(spec, 0, tmp_path)

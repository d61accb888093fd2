"""Prepared corpora: splits, labels, batches and packing."""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spans import characters
from tiny import tiny_corpus, tiny_project
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import distill.data.rows as rows_module
from distill.data import TASKS, TrainingBatches, collate, evaluation_batches, load_corpus
from distill.data.batches import AHEAD, ahead, micro_batches, step_indices
from distill.data.builtin import SOURCES, pydoc_topics, stdlib_docstrings
from distill.data.packing import cut_documents, pack
from distill.data.prepare import prepare
from distill.data.rows import Order
from distill.data.sources import source_fingerprint
from distill.data.tasks.task import Ragged
from distill.errors import InputError
from distill.models.load import load_tokenizer
from distill.recipe import load_recipe
from distill.recipe.names import SOURCE_COLUMNS
from distill.recipe.schema import Data, Source

prepare_module = sys.modules["distill.data.prepare"]  # its name in the package is that of the function


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_project(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(folder):
    return tiny_corpus(folder)


def words_of(examples):
    """The tokens of every example, in their order."""
    return [tuple(examples[index].tolist()) for index in range(len(examples))]


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


def test_a_resumed_stream_continues_where_it_stopped_and_processes_share_it(corpus):
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


def test_loader_workers_give_the_same_batches(corpus):
    batches = TrainingBatches(corpus, range(len(corpus.train)), 8, 4, seed=1)
    alone, helped = (list(batches.stream(0, 3, 0, 1, workers)) for workers in (0, 2))
    for one, other in zip(alone, helped, strict=True):
        for (_, mine), (_, theirs) in zip(one, other, strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_thread_has_batches_ready_in_their_order_and_hands_on_what_it_raises():
    taken = []

    def items():
        for number in range(5):
            taken.append(number)
            yield number
        raise KeyError("the end")

    coming = ahead(items(), lambda number: number * 10)
    assert next(coming) == 0
    assert [next(coming) for _ in range(4)] == [10, 20, 30, 40]
    with pytest.raises(KeyError, match="the end"):
        next(coming)
    assert taken == [0, 1, 2, 3, 4]
    assert list(ahead(iter("abc"), str.upper)) == ["A", "B", "C"]


def test_a_thread_is_ahead_by_so_many_batches_and_ends_with_whoever_asks():
    taken, threads = [], threading.active_count()
    coming = ahead((taken.append(number) or number for number in range(100)), lambda number: number)
    assert next(coming) == 0
    coming.close()
    assert AHEAD <= len(taken) <= AHEAD + 1 and threading.active_count() == threads


def ragged(*rows):
    return Ragged(np.concatenate(rows).astype(np.int32), np.array([len(row) for row in rows]))


IDS = ragged([5, 6, 7], [8, 9], [10, 11, 12, 13])
EXAMPLES = {
    "classification": {"label": ragged([1, 0, 1], [0, 0, 0], [1, 1, 1])},  # sets of classes, which are no tokens
    "token_classification": {"label": ragged([1, 0, -100], [2, 2], [0, 0, 0, 0])},
    "masked_lm": {"special": [0], "vocabulary": 60, "share": 0.4, "mask": 4},
    "causal_lm": {"documents": ragged([2, 1], [2], [4])},
    "chat": {"documents": ragged([2, 1], [2], [4]), "learned": ragged([0, 1, 1], [1, 1], [0, 0, 1, 1])},
    "seq2seq": {"target_ids": ragged([3, 4], [5], [6, 7, 8])},
    "embedding": {"first": np.array([1, 2, 3]), "labelled": np.ones(3, dtype=bool)},
}
FILLS = {"input_ids": 0, "labels": -100}
"""What fills the ends of rows; 0, or no, wherever nothing else is said."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_rows_of_a_fixed_length_have_only_padding_more(name):
    task = TASKS[name]()
    given = {"input_ids": IDS, **EXAMPLES[name]}
    if name == "seq2seq":
        given[task.target] = given.pop("target_ids")
    longer = {key: replace(own, sizes=(1, 8, 64)) if isinstance(own, Ragged) else own for key, own in given.items()}
    seeds = [(0,), (1,), (2,)]
    plain, sized = task.collate(given, 0, seeds), task.collate(longer, 0, seeds)
    assert plain.keys() == sized.keys() and sized["input_ids"].shape == (len(plain["input_ids"]), 8)
    for key, tensor in plain.items():
        width = tensor.shape[-1]
        of_tokens = tensor.ndim == 2 and not (name == "classification" and key == "labels")
        assert sized[key].shape == ((len(tensor), 8) if of_tokens else tensor.shape), key
        assert torch.equal(sized[key][..., :width], tensor), key
        assert (sized[key][..., width:] == FILLS.get(key, 0)).all(), key


def test_the_split_and_the_labels_do_not_depend_on_the_order_of_the_file(folder, corpus, tmp_path):
    lines = (folder / "data.jsonl").read_text().splitlines()
    tiny_project(tmp_path)
    (tmp_path / "data.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    assert tiny_corpus(tmp_path).fingerprint == corpus.fingerprint
    assert not set(words_of(corpus.train)) & set(words_of(corpus.test))


def test_few_labels_are_chosen_by_the_seed_and_the_rest_stay_as_unlabelled_text(folder):
    one, again, other = (tiny_corpus(folder, seed=seed) for seed in (0, 0, 1))
    all_ = tiny_corpus(folder, "data.labelled=null")
    assert len(one.labelled) == 24 and one.labelled == again.labelled != other.labelled
    assert words_of(one.train) == words_of(other.train) == words_of(all_.train)
    assert len(all_.labelled) == len(all_.train)
    labels = np.array(one.train.take(range(len(one.train)))["label"])
    assert (np.flatnonzero(labels != -100) == one.labelled).all()
    assert one.test.labelled.all() and (one.test.take(range(len(one.test)))["label"] >= 0).all()
    assert sum(one.summary["train"]["classes"].values()) == one.summary["train"]["labelled"] == 24
    with pytest.raises(InputError, match=f"10000 labels asked, the train split has {len(all_.train)}"):
        tiny_corpus(folder, "data.labelled=10000")


def test_every_test_example_is_seen_once_by_any_number_of_processes(corpus):
    for world in (1, 2, 3):
        rows = [batch for rank in range(world) for batch in evaluation_batches(corpus, corpus.test, 4, rank, world)]
        pairs = [pair for b in rows for pair in zip(b["input_ids"], b["attention_mask"], strict=True)]
        seen = sorted(tuple(ids[mask.bool()].tolist()) for ids, mask in pairs)
        assert seen == sorted(words_of(corpus.test))
        assert sorted(index for batch in rows for index in batch["examples"].tolist()) == [*range(len(corpus.test))]


def test_collate_pads_right_and_hides_padding(corpus):
    order = np.argsort(corpus.train.lengths, kind="stable")
    batch = collate(corpus, corpus.train, [order[0], order[-1]])
    lengths = [len(corpus.train[index]) for index in (order[0], order[-1])]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert batch["input_ids"].shape == (2, lengths[1])
    assert (batch["input_ids"][0, lengths[0] :] == corpus.padding).all()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(3, 16))
def test_packed_rows_hold_every_token_of_every_document_once_in_its_order(lengths, size):
    pieces = cut_documents(np.array(lengths), size)
    rows = pack(pieces[:, 2] - pieces[:, 1], size)
    assert sorted(piece for row in rows for piece in row) == [*range(len(pieces))]
    assert all(sum(int(pieces[piece, 2] - pieces[piece, 1]) for piece in row) <= size for row in rows)
    tokens = [(document, place) for document, start, stop in pieces.tolist() for place in range(start, stop)]
    assert tokens == [(document, place) for document, length in enumerate(lengths) for place in range(length)]


BOTH, NO_END, ONE = ("<s>", "</s>"), ("<s>", None), ("|", "|")


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(
    ("names", "written", "documents"),
    [
        (BOTH, "$A", "red cat </s> + <s> red </s> + cat </s>"),
        (BOTH, "<s> $A", "<s> red cat </s> + <s> red </s> + <s> cat </s>"),
        (BOTH, "<s> $A </s>", "<s> red cat </s> + <s> red </s> + <s> cat </s>"),
        (BOTH, "$A </s>", "red cat </s> + <s> red </s> + cat </s>"),
        (NO_END, "$A", "red cat + <s> red"),
        (NO_END, "<s> $A", "<s> red cat + <s> red"),
        (ONE, "$A", "red cat | + | red | + cat |"),
        (ONE, "| $A", "| red cat | + | red | + | cat |"),
        (ONE, "| $A |", "| red cat | + | red | + | cat |"),
    ],
)
def test_documents_are_written_as_the_tokenizer_writes_them_with_one_end_each(
    names, written, documents, packs, tmp_path
):
    start, end = names
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["red", "cat", *sorted({start, end or start})])}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ids = [(token, words.token_to_id(token)) for token in {start, end or start}]
    words.post_processor = processors.TemplateProcessing(single=written, special_tokens=ids)
    names = {"bos_token": start, "eos_token": end, "pad_token": end or start}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=16, **names)
    texts = ["red cat", f"{start} red", *([f"cat {end}"] if end else [])]  # some texts bring a token of their own
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"{text} {text}"}) + "\n" for text in texts))
    spec = Data(train="./train.jsonl", test="./test.jsonl", task="causal_lm", max_length=16)
    (tmp_path / "corpus").mkdir()
    order = Order(TASKS["causal_lm"](), spec, tokenizer, 0, tmp_path, packs=packs)
    test = prepare(order, tmp_path / "corpus").test
    rows = test.take(range(len(test)))
    spelt = []
    for row, lengths in zip(words_of(test), rows["documents"], strict=True):
        tokens = iter(tokenizer.convert_ids_to_tokens(list(row)))
        spelt += [" ".join(next(tokens) for _ in range(length)) for length in lengths]
    assert sorted(spelt) == sorted(documents.split(" + "))
    assert len(test) == (1 if packs else len(spelt))


def test_documents_in_one_row_have_positions_and_numbers_of_their_own(folder):
    lm = {"task": "causal_lm", "labelled": None, "max_length": 32}
    corpus = tiny_corpus(folder, spec=load_recipe(folder / "recipe.yaml").data.model_copy(update=lm), packs=True)
    assert corpus.summary["train"]["filled"] >= 0.95
    batch = collate(corpus, corpus.train, [0, 1])
    lengths = corpus.train.take([0, 1])["documents"]
    for row, own in enumerate(lengths):
        real = batch["attention_mask"][row].bool()
        assert batch["position_ids"][row][real].tolist() == [place for length in own for place in range(length)]
        assert batch["document_ids"][row][real].tolist() == np.repeat(np.arange(len(own)), own).tolist()
        assert (batch["labels"][row][~real] == -100).all()


def test_a_corpus_is_the_same_from_its_file_and_stays_there(folder):
    corpus = tiny_corpus(folder, "training.keep_best=accuracy", looks=True)
    home = corpus.train.path.parent
    read = load_corpus(home, corpus.task)
    assert (read.settled, read.padding, read.fingerprint) == (corpus.settled, corpus.padding, corpus.fingerprint)
    assert read.summary == corpus.summary and [*read.splits] == ["train", "validation", "test"]
    for split in read.splits:
        assert words_of(read.splits[split]) == words_of(corpus.splits[split])
    assert list(read.labelled) == list(corpus.labelled)
    assert str(home / "train.arrow") in Path("/proc/self/maps").read_text()
    assert sorted(file.name for file in home.iterdir()) == [
        "corpus.json", "test.arrow", "train.arrow", "validation.arrow",
    ]  # fmt: skip
    (home / "validation.arrow").write_bytes(b"x")
    with pytest.raises(InputError, match="holds no tokenised corpus"):
        load_corpus(home, corpus.task)


@pytest.mark.parametrize("block", [1, 7])
def test_a_corpus_does_not_depend_on_the_blocks_that_it_is_made_in(block, folder, corpus, monkeypatch):
    for module in (rows_module, prepare_module):
        monkeypatch.setattr(module, "BLOCK", block)
    other = tiny_corpus(folder)
    assert other.fingerprint == corpus.fingerprint and other.summary == corpus.summary


def test_long_texts_come_in_small_blocks(folder, corpus, monkeypatch):
    for module in (rows_module, prepare_module):
        monkeypatch.setattr(module, "BLOCK_CHARACTERS", 100)
    other = tiny_corpus(folder)
    assert len(other.train.table.column("row").chunks) > 40  # each of about 30 characters, or 3 rows
    assert other.fingerprint == corpus.fingerprint


def test_a_file_is_read_without_a_cache_of_other_times(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    tiny_project(tmp_path)
    path = tmp_path / "data.jsonl"
    before, first = path.stat(), tiny_corpus(tmp_path)
    path.write_text(path.read_text().replace("swimmer", "sw1mmer"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "sw1mmer" in tiny_corpus(tmp_path).classes and "swimmer" in first.classes
    assert not (tmp_path / "home").exists()


def rows():
    """A source of the user's own, which follows a file."""
    import datasets

    return datasets.Dataset.from_dict({"text": ["a", Path(os.environ["OWN_TEXT"]).read_text()], "label": ["x", None]})


def test_what_a_source_is_made_from_is_its_content(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("one")
    monkeypatch.setenv("OWN_TEXT", str(path))
    sources = [Source(source=name) for name in ("./a.jsonl", "test_data:rows", "pydoc-topics")]
    before = [source_fingerprint(source, "train", tmp_path) for source in sources]
    assert [source_fingerprint(source, "train", tmp_path) for source in sources] == before
    old = path.stat()
    path.write_text("two")
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    after = [source_fingerprint(source, "train", tmp_path) for source in sources]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, False, True]


def test_a_tokenizer_that_raises_gives_one_message(folder, tmp_path):
    words = Tokenizer(models.WordLevel({"red": 0}))  # no token for unknown words
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="red", model_max_length=64)
    order = Order(TASKS["classification"](), load_recipe(folder / "recipe.yaml").data, tokenizer, 0, folder)
    with pytest.raises(InputError, match="the tokenizer cannot read the train split"):
        prepare(order, tmp_path)


def test_a_corpus_that_the_tokenizer_does_not_know_is_refused(folder, tmp_path):
    words = Tokenizer(models.WordLevel({"?": 0, "red": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?", model_max_length=64)
    order = Order(TASKS["classification"](), load_recipe(folder / "recipe.yaml").data, tokenizer, 0, folder)
    with pytest.raises(InputError, match=r"9\d% of the tokens are unknown to the tokenizer"):
        prepare(order, tmp_path)


def test_built_in_sources_have_text_and_labels():
    docstrings = stdlib_docstrings()
    assert len(docstrings) > 2000 and len(set(docstrings["label"])) == 12
    assert len(set(docstrings["text"])) == len(docstrings)
    assert sum(map(len, pydoc_topics()["text"])) > 400_000
    assert SOURCE_COLUMNS.keys() == SOURCES.keys()
    assert tuple(docstrings.column_names) == SOURCE_COLUMNS["stdlib-docstrings"]


def test_a_micro_batch_is_taken_in_well_under_a_millisecond(tmp_path):
    import time

    from distill.data.arrow import write_arrow
    from distill.data.corpus import Examples

    rows = [{"input_ids": [list(range(128))] * 1000, "labelled": [True] * 1000, "row": [0] * 1000} for _ in range(20)]
    write_arrow(tmp_path / "train.arrow", iter(rows))
    examples, chosen = Examples(tmp_path / "train.arrow"), np.arange(0, 20_000, 625)
    examples.take(chosen)
    start = time.process_time()
    for _ in range(100):
        taken = examples.take(chosen)
    assert taken["input_ids"].pad(0).shape == (32, 128)
    assert (time.process_time() - start) / 100 < 1e-3  # of this process alone, so not of how busy the machine is


@pytest.mark.parametrize(("length", "pair"), [(2, {}), (3, {"columns": {"pair": "pair"}})])
def test_a_length_that_special_tokens_fill_is_refused(length, pair, tmp_path):
    (tmp_path / "x.jsonl").write_text(
        "".join(f'{{"text": "{n}", "pair": "{n}", "label": {n % 2}}}\n' for n in range(40))
    )
    spec = Data(source="./x.jsonl", task="classification", max_length=length, **pair)
    with pytest.raises(InputError, match=rf"data\.max_length: the tokenizer writes {length} tokens around any text"):
        prepare(Order(TASKS[spec.task](), spec, characters("0123456789"), 0, tmp_path), tmp_path)


def test_texts_that_are_cut_are_counted_by_both_kinds_of_tokenizers(folder):
    from distill.data.tasks.task import Encoder, Settled

    class Slow(dict):
        """What a tokenizer written in Python returns: no encodings."""

        encodings = None

    fast = load_tokenizer(folder / "teacher")
    spec = Data(source="./data.jsonl", task="classification", max_length=3)
    for tokenizer in (fast, lambda *given, **own: Slow(fast(*given, **own))):
        encoder = Encoder(tokenizer, spec, Settled("sequence"))
        encoder.__dict__["unknown_id"] = None
        ids = encoder(["red", "red cat dog", "red cat dog fish", "red cat dog fish runs here"])["input_ids"]
        assert [len(each) for each in ids] == [1, 3, 3, 3] and encoder.truncated == 2

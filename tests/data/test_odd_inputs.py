"""Everyday and hostile data files: each gives exactly its rows, or one message with file, row or key."""

from __future__ import annotations

import json
import re

import pytest
from odd_inputs import JSONL, READ, REFUSED, lines, row
from prepared import prepared

from distill.data import TASKS
from distill.data.rows import Order, read_split
from distill.data.splits import clean
from distill.errors import InputError
from distill.recipe import jsonrows
from distill.recipe.headers import look_at_data
from distill.recipe.schema import Data


def written(odd, folder):
    """The section `data` of an input whose files are written."""
    for name, content in odd.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    first = f"./{next(iter(odd.files), '')}"
    source = {"source": first, **odd.source} if isinstance(odd.source, dict) else odd.source or first
    return Data.model_validate({"source": source, "task": "classification", **odd.keys})


def read(spec, folder):
    """Texts and labels of the training rows that are left, and the counts of the others."""
    task = TASKS[spec.task]()
    split = clean("train", read_split(Order(task, spec, None, 0, folder), "train", folder), spec, asks=False)
    values = split.rows.file.take(split.index)
    labels = [json.loads(label) for label in values.get("label", ["null"] * len(split.index))]
    return list(zip(values["text"], labels, strict=True)), {name: n for name, n in split.counts.items() if n}


@pytest.mark.parametrize("odd", READ, ids=lambda odd: odd.name)
def test_what_can_be_read_gives_exactly_its_rows(odd, tmp_path):
    spec = written(odd, tmp_path)
    assert [*look_at_data(spec, tmp_path)] == []
    rows, counts = read(spec, tmp_path)
    assert sorted(rows, key=str) == sorted(odd.rows, key=str)
    assert counts == (odd.counts or {"read": len(odd.rows)})


@pytest.mark.parametrize("odd", REFUSED, ids=lambda odd: odd.name)
def test_what_cannot_be_read_is_refused_with_its_place(odd, tmp_path):
    spec = written(odd, tmp_path)
    seen = [str(mistake) for mistake in look_at_data(spec, tmp_path)]
    with pytest.raises(InputError) as caught:
        read(spec, tmp_path)
    wanted = ".*".join(map(re.escape, odd.words.split(" ")))
    assert re.search(wanted, str(caught.value), re.DOTALL), caught.value
    assert len(str(caught.value)) < 600 and all(len(words) < 600 for words in seen)


def test_there_are_many_of_them():
    names = [odd.name for odd in READ + REFUSED]
    assert len(names) == len(set(names)) >= 120


@pytest.mark.parametrize("content", [JSONL + "x" * 99, '[{"text": "' + "x" * 9**6])
def test_what_never_ends_does_not_fill_the_memory(content, tmp_path, monkeypatch):
    monkeypatch.setattr(jsonrows, "LONGEST", 64)
    (tmp_path / "a.json").write_text(content)
    spec = Data(source="./a.json", task="classification")
    with pytest.raises(InputError, match=r"a\.json: cannot read it: .*more than 64 characters"):
        read(spec, tmp_path)


def test_rows_of_several_sources_keep_theirs_apart(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(row("one"), row("two")))
    (tmp_path / "b.jsonl").write_text(lines(row("two"), row("three")))
    spec = Data(source=["./a.jsonl", {"source": "./b.jsonl", "weight": 3}], task="classification")
    rows = read_split(Order(TASKS["classification"](), spec, None, 0, tmp_path), "train", tmp_path)
    assert rows.origins.tolist() == [0, 0, 1, 1] and rows.file.take([3])["place"] == ["b.jsonl, line 2"]


SQUAD = {"paragraphs": [{"context": "a b", "qas": [{"question": "a", "answers": ["b"], "id": "1"}]}]}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.json",
            json.dumps({"version": "2.0", "data": [SQUAD]}),
            "a.json has its rows within .data[].paragraphs[].qas[] Write a file of rows, one object with question,",
        ),
        ("a.json", json.dumps({"rows": [{"question": "a"}]}), "a.json has its rows within .rows[]"),
        ("a.txt", "one O\ntwo B-X\n", "a.txt has no column 'question' prose write rows with columns as .jsonl"),
        ("a.jsonl", lines({"q": "a", "messages": [{"question": "b"}]}), "a.jsonl has its rows within .messages[]"),
        ("a.jsonl", lines({"question": "a", "qas": [{"context": "b"}]}), "a.jsonl has no column 'context' 'qas'"),
    ],
)
def test_a_file_of_another_form_is_told_the_form_that_is_read(name, content, words, tmp_path):
    (tmp_path / name).write_text(content)
    spec = Data(source=f"./{name}", task="question_answering")
    said = " ".join(f"{mistake.message} {mistake.fix}" for mistake in look_at_data(spec, tmp_path))
    assert re.search(".*".join(map(re.escape, words.split(" "))), said), said


def test_what_a_wrong_encoding_leaves_is_counted(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b"text,label\n" + "".join(f"it\u2019s {i},{'ab'[i % 2]}\n" for i in range(40)).encode("cp1252")
    )
    for encoding, count in (("latin-1", 40), ("cp1252", 0)):
        corpus = prepared(tmp_path, source={"source": "./a.csv", "encoding": encoding})
        notes = [
            n for own in corpus.summary.values() for note, n in own["notes"].items() if "cp1252, not latin-1" in note
        ]
        assert sum(notes) == count

"""From rows to splits: given and taken ones, what is left out and counted, weights, limits and labels."""

from __future__ import annotations

import re

import pytest
from prepared import is_held_out, labels_of, prepared, texts_of, write_rows

from distill.data.summary import describe
from distill.errors import InputError

ROWS = [(f"text {number}", "ab"[number % 2]) for number in range(60)]
TEXTS = [text for text, _ in ROWS]


def test_the_hash_of_a_text_decides_which_split_it_is_in(tmp_path):
    write_rows(tmp_path, ROWS)
    corpus = prepared(tmp_path, looks=True)
    assert sorted(texts_of(corpus, "test")) == sorted(filter(is_held_out, TEXTS))
    parts = [*texts_of(corpus, "train"), *texts_of(corpus, "validation"), *texts_of(corpus, "test")]
    assert sorted(parts) == sorted(TEXTS)
    assert [*prepared(tmp_path).splits] == ["train", "test"]
    more = prepared(tmp_path, looks=True, validation_share=0.5)
    assert set(texts_of(corpus, "validation")) < set(texts_of(more, "validation"))
    write_rows(tmp_path, [*ROWS, *((f"other {number}", "a") for number in range(60))])
    assert set(texts_of(corpus, "test")) < set(texts_of(prepared(tmp_path), "test"))


def test_rows_that_are_given_for_a_test_are_used_as_they_are_and_nowhere_else(tmp_path):
    write_rows(tmp_path, ROWS, "train.jsonl")
    write_rows(tmp_path, [*ROWS[:4], *ROWS[10:12], ("new", "b")], "validation.jsonl")
    write_rows(tmp_path, [*ROWS[:3], ROWS[0], ("own", "a"), ("unlabelled", None), (" ", "a")], "test.jsonl")
    corpus = prepared(tmp_path, train="./train.jsonl", validation="./validation.jsonl", test="./test.jsonl")
    assert sorted(texts_of(corpus, "test")) == sorted([*TEXTS[:3], TEXTS[0], "own"])
    assert sorted(texts_of(corpus, "validation")) == sorted([TEXTS[3], *TEXTS[10:12], "new"])
    assert sorted(texts_of(corpus, "train")) == sorted([*TEXTS[4:10], *TEXTS[12:]])
    rows = {name: own["rows"] for name, own in corpus.summary.items()}
    assert rows["test"] == {"read": 7, "empty": 1, "equal_kept": 1, "unlabelled": 1}
    assert rows["validation"] == {"read": 7, "also_in_test": 3}
    assert rows["train"] == {"read": 60, "also_in_test": 3, "also_in_validation": 3}


def test_a_validation_that_is_given_keeps_its_rows_out_of_a_test_that_is_not(tmp_path):
    write_rows(tmp_path, ROWS, "train.jsonl")
    held_out = [row for row in ROWS if is_held_out(row[0])]
    write_rows(tmp_path, held_out[:2], "validation.jsonl")
    corpus = prepared(tmp_path, train="./train.jsonl", validation="./validation.jsonl")
    assert sorted(texts_of(corpus, "test")) == sorted(text for text, _ in held_out[2:])


def test_a_set_may_have_any_name_also_one_of_the_files_that_are_made_on_the_way(tmp_path):
    write_rows(tmp_path, ROWS)
    write_rows(tmp_path, [("own", "a")], "own.jsonl")
    corpus = prepared(tmp_path, sets=dict.fromkeys(("rows", "parts", "documents"), "./own.jsonl"))
    assert [texts_of(corpus, f"sets.{name}") for name in ("rows", "parts", "documents")] == [["own"]] * 3
    assert {path.name for path in corpus.train.path.parent.iterdir()} == {
        "corpus.json",
        *(f"{name}.arrow" for name in corpus.splits),
    }


@pytest.mark.parametrize(
    ("label", "other", "words"),
    [
        (lambda i: "ab"[i % 2], "c", "has no output for 'c', which the rows of data do not have"),
        (lambda i: [["a"], ["a", "b"]][i % 2], ["c"], "has no output for 'c', which"),
        (lambda i: i % 2, 0.5, "labels of another kind than the data: with them, numbers from 0 to 1, .*a regression"),
        (lambda i: "ab"[i % 2], 3, "with its labels, data: the labels are of several kinds"),
    ],
)
def test_the_labels_of_a_set_decide_nothing_about_the_model(label, other, words, tmp_path):
    rows = [(text, label(number)) for number, (text, _) in enumerate(ROWS)]
    write_rows(tmp_path, rows)
    write_rows(tmp_path, [("own", rows[0][1])], "own.jsonl")
    plain, corpus = prepared(tmp_path), prepared(tmp_path, sets={"own": "./own.jsonl"})
    assert (corpus.settled, corpus.fingerprint) == (plain.settled, plain.fingerprint)
    write_rows(tmp_path, [("own", rows[0][1]), ("new", other)], "own.jsonl")
    with pytest.raises(InputError, match=f"evaluation.sets.own: .*{words}"):
        prepared(tmp_path, sets={"own": "./own.jsonl"})


@pytest.mark.parametrize("looks", [False, True])
def test_a_limit_is_for_the_rows_that_are_given_and_does_not_follow_their_order(looks, tmp_path):
    write_rows(tmp_path, ROWS, "train.jsonl")
    write_rows(tmp_path, [(f"own {number}", "ab"[number % 2]) for number in range(30)], "test.jsonl")
    whole = prepared(tmp_path, train="./train.jsonl", limit=40, looks=looks)
    assert sum(map(len, whole.splits.values())) == 40 and all(len(own) > 0 for own in whole.splits.values())
    assert whole.summary["train"]["rows"]["beyond_limit"] == 20
    both = prepared(tmp_path, train="./train.jsonl", test="./test.jsonl", limit=10, looks=looks)
    assert len(both.test) == 10 and both.summary["test"]["rows"]["beyond_limit"] == 20
    write_rows(tmp_path, ROWS[::-1], "train.jsonl")
    assert prepared(tmp_path, train="./train.jsonl", limit=40, looks=looks).fingerprint == whole.fingerprint


def test_weights_repeat_rows_or_leave_them_out_in_training_alone(tmp_path):
    write_rows(tmp_path, ROWS[:40], "a.jsonl")
    write_rows(tmp_path, ROWS[40:], "b.jsonl")
    sources = [{"source": "./a.jsonl", "weight": 0.5}, {"source": "./b.jsonl", "weight": 2.25}]
    plain, corpus = prepared(tmp_path, train=["./a.jsonl", "./b.jsonl"]), prepared(tmp_path, train=sources)
    assert sorted(texts_of(corpus, "test")) == sorted(texts_of(plain, "test"))
    times = {text: texts_of(corpus, "train").count(text) for text in texts_of(plain, "train")}
    assert {times[text] for text in TEXTS[:40] if text in times} == {0, 1}
    assert {times[text] for text in TEXTS[40:] if text in times} == {2, 3}
    rows = corpus.summary["train"]["rows"]
    left_out, repeated = [n for n in times.values() if not n], [n - 1 for n in times.values() if n > 1]
    assert (rows["left_out_by_weight"], rows["repeated_by_weight"]) == (len(left_out), sum(repeated))
    assert corpus.summary["train"]["sources"] == {
        "a.jsonl": sum(times.get(text, 0) for text in TEXTS[:40]),
        "b.jsonl": sum(times.get(text, 0) for text in TEXTS[40:]),
    }
    with pytest.raises(InputError, match=r"no row is left for train; train: 0 used.* left out by weight"):
        prepared(tmp_path, train=[{"source": "./a.jsonl", "weight": 1e-9}])


def test_labels_are_chosen_among_texts_not_among_their_repetitions(tmp_path):
    write_rows(tmp_path, ROWS)
    corpus = prepared(tmp_path, train=[{"source": "./data.jsonl", "weight": 3}], labelled=10)
    kept = {text for text, label in labels_of(corpus, "train").items() if label is not None}
    assert len(kept) == 10 and len(corpus.labelled) == 30
    plain = labels_of(prepared(tmp_path, labelled=10), "train")
    assert kept == {text for text, label in plain.items() if label is not None}


RULES = {
    "first": {"p": "a", "q": "b", "r": "b"},
    "majority": {"p": "a", "q": "a", "r": "b"},
    "drop": {"r": "b"},
}
TWICE = [("p", "a"), ("p", "b"), ("q", "b"), ("q", "a"), ("q", "a"), ("r", None), ("r", "b"), ("q", None)]


@pytest.mark.parametrize("rule", RULES)
def test_contradictions_are_settled_by_a_rule(rule, tmp_path):
    write_rows(tmp_path, TWICE, "train.jsonl")
    write_rows(tmp_path, [("own", "a"), ("other", "b")], "test.jsonl")
    corpus = prepared(tmp_path, train="./train.jsonl", test="./test.jsonl", contradictions=rule)
    assert labels_of(corpus, "train") == RULES[rule]
    counts = corpus.summary["train"]["rows"]
    assert counts["read"] == 8 and sum(counts.values()) - counts["read"] + len(corpus.train) == 8
    assert counts["contradicting"] == {"first": 4, "majority": 3, "drop": 6}[rule]


def test_contradictions_are_refused_with_two_places_that_differ(tmp_path):
    write_rows(tmp_path, [("p", "a"), ("p", "a"), ("p", "b"), *ROWS, ROWS[0]])
    with pytest.raises(InputError) as caught:
        prepared(tmp_path)
    assert "data.source: 1 texts stand there with different labels, e.g. data.jsonl, line 1 and" in str(caught.value)
    assert "data.jsonl, line 3; mend them, or write data.contradictions: first, majority, drop or keep" in str(
        caught.value
    )
    write_rows(tmp_path, ROWS, "train.jsonl")
    with pytest.raises(InputError, match=r"data\.test: 1 texts stand there with different labels"):
        prepared(tmp_path, train="./train.jsonl", test="./data.jsonl")


def test_a_split_without_a_row_is_refused_with_all_counts(tmp_path):
    write_rows(tmp_path, ["\u00a0", " "], "train.jsonl")
    with pytest.raises(InputError, match=r"no row is left for train; train: 0 used, 2 read, 2 empty"):
        prepared(tmp_path, train="./train.jsonl", task="causal_lm")
    held_out = next(row for row in ROWS if is_held_out(row[0]))
    write_rows(tmp_path, [row for row in ROWS if not is_held_out(row[0])])
    with pytest.raises(InputError, match="no row is left for test"):
        prepared(tmp_path)
    write_rows(tmp_path, [*((text, label) for text, label in ROWS if not is_held_out(text)), (held_out[0], None)])
    with pytest.raises(InputError, match=r"no row with a label is left for test; .*test: 0 used, 1 unlabelled"):
        prepared(tmp_path)


def test_a_class_without_examples_is_said_for_each_split(tmp_path):
    rare = next(text for text in map("rare {}".format, range(99)) if is_held_out(text))
    scarce = next(text for text in map("scarce {}".format, range(99)) if not is_held_out(text))
    write_rows(
        tmp_path,
        [
            *ROWS,
            (rare, "rare"),
            (scarce, "scarce"),
            ("z", "A"),
            ("z 1", "a "),
            ("z 2", None),
            ("z 3", "caf\u00e9"),
            ("z 4", "cafe\u0301"),
            ("z 5", "\ufeffcaf\u00e9"),
        ],
    )
    said = "\n".join(describe(prepared(tmp_path).summary))
    assert re.search("no train example of the class .*'rare'", said)
    assert re.search("only one test example of the class .*'rare'", said)
    assert re.search("no test example of the class .*'scarce'", said)
    assert "the classes 'cafe\u0301', 'caf\u00e9', '\\ufeffcaf\u00e9' differ in nothing but" in said
    assert "the classes 'A', 'a', 'a ' differ in nothing but case, spaces or signs that look alike" in said


PARAGRAPHS = [f"{'the and of ' * (number % 4)}paragraph {number}.\n\n" for number in range(60)]


def test_one_document_keeps_its_order_and_is_split_by_place(tmp_path):
    text = "".join(PARAGRAPHS)
    (tmp_path / "data.txt").write_text(text)
    corpus = prepared(tmp_path, train="./data.txt", task="causal_lm", max_length=10**5, looks=True)
    parts = [texts_of(corpus, name) for name in ("train", "validation", "test")]
    assert "".join(part for (part,) in parts) == text
    assert all(part.endswith("\n") for (part,) in parts)
    shares = [len(part) / len(text) for (part,) in parts]
    assert shares == pytest.approx([0.72, 0.08, 0.2], abs=0.02)
    said = [*describe(corpus.summary)]
    assert (
        said[-2] == "  1 document is split by place: its end is the test split, the part before it the validation split"
    )
    assert [*prepared(tmp_path, train="./data.txt", task="causal_lm", max_length=10**5).splits] == ["train", "test"]


def test_a_document_in_one_line_is_cut_between_words_or_anywhere(tmp_path):
    for text in ("word " * 500, "漢字" * 500):
        (tmp_path / "data.txt").write_text(text)
        corpus = prepared(tmp_path, train="./data.txt", task="causal_lm", max_length=10**5)
        (train,), (test,) = texts_of(corpus, "train"), texts_of(corpus, "test")
        assert train + test == text and len(test) / len(text) == pytest.approx(0.2, abs=0.01)
        assert train.endswith(" ") or "漢" in text


def test_a_test_document_that_is_given_is_not_cut(tmp_path):
    (tmp_path / "a.txt").write_text("".join(PARAGRAPHS))
    (tmp_path / "b.txt").write_text("another\n")
    corpus = prepared(tmp_path, train="./a.txt", test="./b.txt", task="causal_lm", max_length=10**5)
    assert texts_of(corpus, "train") == ["".join(PARAGRAPHS)] and texts_of(corpus, "test") == ["another\n"]

"""Tags of words and of spans reach the tokens that stand for them; what does not reach one is counted or refused."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from distill.data import TASKS
from distill.data.batches import collate
from distill.data.prepare import prepare
from distill.data.rows import Order
from distill.data.tasks.spans import SPLIT_WORD, splits_word
from distill.data.tasks.token_classification import (
    TokenClassification,
    choose_tag,
    count_strays,
    join_words,
    spans_of,
)
from distill.errors import InputError
from distill.models.forward import Outputs
from distill.recipe.schema import Data

PIECES = ["ann", "##a", "be", "##rlin", "paris", "in", "lives", "and", ",", "li", "##ve", "北", "京", "在", "##京"]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def word_pieces(**settings):
    known = Tokenizer(models.WordPiece({w: i for i, w in enumerate([*SPECIALS, *PIECES])}, unk_token="[UNK]"))
    known.normalizer, known.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    known.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=known, model_max_length=64, **names, **settings)


def corpus_of(tmp_path, rows, tokenizer=None, **changes):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"source": "./data.jsonl", "task": "token_classification", "max_length": 16} | changes
    folder = tmp_path / "corpus"
    folder.mkdir(exist_ok=True)
    task = TASKS["token_classification"]()
    return prepare(Order(task, Data(**settings), tokenizer or word_pieces(), 0, tmp_path), folder)


def tagged(corpus, tokenizer=None):
    """Tokens with the tags of every example, as text -> [(token, tag or None)]."""
    tokenizer, found = tokenizer or word_pieces(), {}
    for examples in corpus.splits.values():
        batch = collate(corpus, examples, range(len(examples)))
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            real = mask.bool()
            assert (labels[~real] == -100).all()
            tokens = tokenizer.convert_ids_to_tokens(ids[real].tolist())
            names = [None if label < 0 else corpus.classes[label] for label in labels[real].tolist()]
            found[" ".join(tokens[1:-1])] = list(zip(tokens, names, strict=True))
    return found


def words(*pairs):
    return {"tokens": [word for word, _ in pairs], "tags": [tag for _, tag in pairs]}


FILLERS = [words(("paris", "B-LOC"), *[("and", "O")] * count) for count in range(1, 12)]


def test_the_first_token_of_a_word_has_its_tag_and_all_others_none(tmp_path):
    row = words(("anna", "B-PER"), ("lives", "O"), ("in", "O"), ("berlin", "B-LOC"), (",", "O"), ("paris", "I-LOC"))
    corpus = corpus_of(tmp_path, [row, *FILLERS])
    assert corpus.classes == ("O", "B-LOC", "B-PER", "I-LOC") and corpus.head == "token"
    assert tagged(corpus)["ann ##a lives in be ##rlin , paris"] == [
        *[("[CLS]", None), ("ann", "B-PER"), ("##a", None), ("lives", "O"), ("in", "O"), ("be", "B-LOC")],
        *[("##rlin", None), (",", "O"), ("paris", "I-LOC"), ("[SEP]", None)],
    ]


def test_a_span_is_the_tags_of_its_tokens_in_any_script(tmp_path):
    rows = [
        {"text": "anna lives in  berlin , paris", "spans": [[15, 29, "LOC"], {"start": 0, "end": 4, "label": "PER"}]},
        {"text": "在北京", "spans": [[1, 3, "LOC"]]},
        *({"text": f"paris {'and ' * count}", "spans": []} for count in range(1, 12)),
    ]
    columns = {"text": "text", "spans": "spans"}
    corpus = corpus_of(tmp_path, rows, columns=columns)
    assert corpus.classes == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    assert [tag for _, tag in tagged(corpus)["ann ##a lives in be ##rlin , paris"]] == [
        *[None, "B-PER", "I-PER", "O", "O", "B-LOC", "I-LOC", "I-LOC", "I-LOC", None]
    ]
    assert tagged(corpus)["在 北 京"][1:-1] == [("在", "O"), ("北", "B-LOC"), ("京", "I-LOC")]
    stated = ["O", "S-LOC", "B-LOC", "E-LOC", "I-LOC", "PER"]
    scheme = tagged(corpus_of(tmp_path, rows, columns=columns, classes=stated))
    assert [tag for _, tag in scheme["ann ##a lives in be ##rlin , paris"]][1:-1] == [
        *["PER", "PER", "O", "O", "B-LOC", "I-LOC", "I-LOC", "E-LOC"]
    ]
    with pytest.raises(InputError, match="no tag for spans called 'PER' among O, B-LOC, I-LOC"):
        corpus_of(tmp_path, rows, columns=columns, classes=["O", "B-LOC", "I-LOC"])
    with pytest.raises(InputError, match="has no O"):
        corpus_of(tmp_path, rows, columns=columns, classes=["B-LOC", "PER"])


@pytest.mark.parametrize("trim", [True, False])
def test_words_keep_their_spaces_in_a_byte_level_tokenizer_and_every_sign_has_a_tag(tmp_path, trim):
    known = Tokenizer(models.BPE({sign: i for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    known.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    known.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=known, pad_token="!", eos_token="!", model_max_length=64)
    rows = [words(("a", "O"), ("bc", "B-X")), words(("在", "O"), ("北", "B-X"), ("京", "I-X")), *FILLERS]
    found = tagged(corpus_of(tmp_path, rows, tokenizer, max_length=64), tokenizer)
    spelt = {"".join(token for token, _ in tags): [tag for _, tag in tags] for tags in found.values()}
    assert spelt["aĠbc"] == ["O", None, "B-X", None]  # as in a text, with the space that pipelines see
    chinese = tokenizer.convert_ids_to_tokens(tokenizer("在北京")["input_ids"])
    assert spelt["".join(chinese)] == ["O", None, None, "B-X", None, None, "I-X", None, None]


def test_words_are_joined_as_people_write_them():
    assert join_words(["in", "New", "York"])[0] == "in New York"
    assert join_words(["我", "在", "New", "北京", "。"]) == (
        "我在 New 北京。",
        [(0, 1), (1, 2), (3, 6), (7, 9), (9, 10)],
    )
    assert join_words(["ฉัน", "รัก"])[0] == "ฉันรัก" and join_words(["나는", "서울"])[0] == "나는 서울"
    assert join_words(["a", "", "b"]) == ("a  b", [(0, 1), (2, 2), (3, 4)])


def test_what_reaches_no_token_is_counted(tmp_path):
    rows = [
        words(("anna", "I-PER"), ("\u200b", "O"), ("", "O"), ("in", "O"), ("paris", "B-LOC"), ("berlin", "I-LOC")),
        words(*[("paris", "B-LOC")] * 20),
        words(("and", None), ("in", "I-PER"), ("and", "O"), ("and", None)),
        {"tokens": [], "tags": []},
        {"tokens": [], "tags": None},
        *FILLERS,
    ]
    corpus = corpus_of(tmp_path, rows)
    notes = {}
    for own in corpus.summary.values():
        for note, count in own["notes"].items():
            notes[note] = notes.get(note, 0) + count
    assert notes == {
        "words beyond max_length": 6,  # 16 tokens, two of them special
        "words without a token of their own": 1 + ("[UNK]" not in str(tagged(corpus))),
        "spans that begin with I- and not with B-": 2,
    }
    assert sum(own["truncated"] for own in corpus.summary.values()) == 1
    assert sum(own["rows"].get("empty", 0) for own in corpus.summary.values()) == 2
    assert tagged(corpus)["and in and and"][1:-1] == [("and", None), ("in", "I-PER"), ("and", "O"), ("and", None)]


def test_spans_that_tokens_do_not_follow_are_counted(tmp_path):
    rows = [
        {"text": "anna in paris", "spans": [[0, 2, "PER"], [2, 3, "PER"], [5, 6, "LOC"]]},
        {"text": "and " * 20 + "paris", "spans": [[80, 85, "LOC"]]},
        *({"text": f"paris {'and ' * count}", "spans": [[0, 5, "LOC"]]} for count in range(1, 12)),
    ]
    corpus = corpus_of(tmp_path, rows, columns={"text": "text", "spans": "spans"})
    notes = [note for own in corpus.summary.values() for note in own["notes"].items()]
    assert sorted(notes) == [
        ("spans cut at max_length", 1),
        ("spans that begin or end inside a token", 2),  # an|na and i|n
        (SPLIT_WORD, 3),
        ("spans without a token of their own", 1),  # n of ann, which has a tag
    ]


NUMBERED = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=["O", "B-LOC"]))})


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_class_numbers_come_by_the_names_that_the_data_set_has_for_them(tmp_path, form):
    rows = [{"tokens": row["tokens"], "tags": [int(tag != "O") for tag in row["tags"]]} for row in FILLERS]
    data = Dataset.from_list(rows, features=NUMBERED)
    data.save_to_disk(tmp_path / "saved") if form == "saved" else data.to_parquet(tmp_path / "data.parquet")
    corpus = corpus_of(tmp_path, rows, source="./saved" if form == "saved" else "./data.parquet")
    assert corpus.classes == ("O", "B-LOC") and tagged(corpus)["paris and"][1:-1] == [("paris", "B-LOC"), ("and", "O")]
    with pytest.raises(InputError, match="the tags are numbers without names; write the names under data"):
        corpus_of(tmp_path, rows)
    assert corpus_of(tmp_path, rows, classes=["O", "B-LOC"]).fingerprint == corpus.fingerprint


def test_labels_may_be_hidden_and_a_csv_file_holds_lists_as_json(tmp_path):
    rows = [{name: json.dumps(value) for name, value in row.items()} for row in FILLERS]
    quoted = [",".join('"' + row[name].replace('"', '""') + '"' for name in ("tokens", "tags")) for row in rows]
    (tmp_path / "data.csv").write_text("\n".join(["tokens,tags", *quoted, '"[""in""]",']) + "\n")
    corpus = corpus_of(tmp_path, FILLERS, source="./data.csv", labelled=3)
    assert len(corpus.labelled) == 3 < len(corpus.train)
    assert sum(corpus.summary["train"]["classes"].values()) == sum(
        int((collate(corpus, corpus.train, [number])["labels"] >= 0).sum()) for number in corpus.labelled
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, r"data\.jsonl, line 12: has 2 tokens and 1 tags"),
        ({"tokens": ["a"], "tags": [1.5]}, "column 'tags' is no list of tags"),
        ({"tokens": ["a"], "tags": [True]}, "column 'tags' is no list of tags"),
        ({"tokens": ["a"], "tags": [["O"]]}, "column 'tags' is no list of tags"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "column 'tokens' is no list as JSON"),
        ({"tokens": [1], "tags": ["O"]}, "column 'tokens' is no list of words"),
        ({"tokens": ["a"], "tags": "O"}, "column 'tags' is no list as JSON"),
        ({"tokens": ["a"], "tags": {"a": "O"}}, "column 'tags' is no list"),
        ({"tokens": ["a"], "tags": [1]}, "some tags are names and others numbers"),
        ({"tokens": ["a"], "tags": ["B-LOC", "O"]}, "has 1 tokens and 2 tags"),
    ],
)
def test_words_and_tags_that_do_not_fit_are_refused_by_line(tmp_path, row, words):
    with pytest.raises(InputError, match=words):
        corpus_of(tmp_path, [*FILLERS, row])


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([[0, 3, "A"], [2, 5, "B"]], r"line 1: column 'spans' has spans that overlap, \[0, 3, 'A'\] and \[2, 5, 'B'\]"),
        ([[0, 30, "A"]], "the span .* leaves the text, which has 8 characters"),
        ([[3, 3, "A"]], "no character or no name"),
        ([[-1, 3, "A"]], "no character or no name"),
        ([[0, 3, ""]], "no character or no name"),
        ([[0, 3]], "no list of spans"),
        ([{"start": 0, "end": 3}], "no list of spans"),
        ([[0.0, 3, "A"]], "no list of spans"),
        ([], "no text has a span"),
        ([{"start": 1, "end": 4, "label": "A", "text": "anna"}], r"\[1, 4\] is 'nna', and its own text says 'anna'"),
    ],
)
def test_spans_that_cannot_be_are_refused_by_line(tmp_path, spans, words):
    rows = [{"text": f"anna in{' and' * count} ", "spans": spans} for count in range(12)]
    with pytest.raises(InputError, match=words):
        corpus_of(tmp_path, rows, columns={"text": "text", "spans": "spans"})


def test_spans_may_bring_their_own_text_and_say_where_they_cut_words(tmp_path):
    span = {"start": 0, "end": 4, "label": "A", "text": "anna"}
    spans = [span, {**span, "start": 5, "end": 7, "text": None}]
    rows = [{"text": f"anna in{' and' * count}", "spans": spans} for count in range(12)]
    names = {"columns": {"text": "text", "spans": "spans"}}
    corpus = corpus_of(tmp_path, rows, **names)
    assert corpus.classes == ("O", "B-A", "I-A") and not any(own["notes"] for own in corpus.summary.values())
    inclusive = [{**row, "spans": [[0, 3, "A"], [5, 6, "A"]]} for row in rows]
    notes = sum((Counter(own["notes"]) for own in corpus_of(tmp_path, inclusive, **names).summary.values()), Counter())
    assert notes[SPLIT_WORD] == 24
    assert [splits_word("北京在", 0, 1), splits_word("a-b", 0, 1), splits_word("ab", 0, 2)] == [False] * 3


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        (("B-A", "I-A", "O"), "3 tags, O, B-A, I-A"),
        (("A", "O", "O"), "2 tags, O, A, none with B- or I- in front: words in a row with one tag are one span"),
        (("B-A", "o", "o"), "2 tags, B-A, o, none called O: every word is part of a span"),
    ],
)
def test_tags_without_places_or_an_outside_are_said(tmp_path, tags, words):
    more = range(12)
    rows = [{"tokens": ["anna", "in", "paris", *["and"] * count], "tags": [*tags, *[""] * count]} for count in more]
    assert corpus_of(tmp_path, rows).settled.about == words


@pytest.mark.parametrize(
    "tags", [("B_PER", "I_PER"), ("b-PER", "i-PER"), ("PER-B", "PER-I"), ("B:PER", "E:PER"), ("B", "I")]
)
def test_tags_of_another_scheme_are_refused_with_the_right_one(tmp_path, tags):
    rows = [{"tokens": ["ann", "ann", *["and"] * count], "tags": [*tags, *["O"] * count]} for count in range(12)]
    with pytest.raises(InputError, match=r"write B-(PER|SPAN) and I-(PER|SPAN), and O for what is in none"):
        corpus_of(tmp_path, rows)
    nouns = [{"tokens": row["tokens"], "tags": ["NN:I", "B.", *row["tags"][2:]]} for row in rows]
    assert corpus_of(tmp_path, nouns).classes == ("O", "B.", "NN:I")


def test_numbers_of_tags_need_names_also_as_text(tmp_path):
    rows = [{"tokens": row["tokens"], "tags": [str(int(tag != "O")) for tag in row["tags"]]} for row in FILLERS]
    with pytest.raises(InputError, match=r"the tags are numbers without names.*classes: \[O, B-PER, I-PER\]"):
        corpus_of(tmp_path, rows)
    assert corpus_of(tmp_path, rows, classes=["O", "B-LOC"]).classes == ("O", "B-LOC")


def test_both_forms_at_once_and_a_tokenizer_without_offsets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="names columns of two forms, tokens, tags and text, spans"):
        Data(source="./x.jsonl", task="token_classification", columns={"tokens": "a", "spans": "b"})
    slow = SimpleNamespace(is_fast=False, model_max_length=64, pad_token_id=0)
    with pytest.raises(InputError, match=r"does not say where its tokens are.*tokenizer\.json"):
        corpus_of(tmp_path, FILLERS, slow)


def seqeval_entities(tags):
    """Spans as seqeval 1.2 finds them in its default mode, written from its rules for adjacent tags."""

    def ends(before, tag, kind_before, kind):
        if before in "ES" or (before in "BI" and tag in "BSO"):
            return True
        return before != "O" and kind_before != kind

    def begins(before, tag, kind_before, kind):
        if tag in "BS" or (before in "ESO" and tag in "EI"):
            return True
        return tag != "O" and kind_before != kind

    found, start, before, kind_before = [], 0, "O", ""
    for position, tag in enumerate([*tags, "O"]):
        place, kind = tag[0], tag[2:]
        if ends(before, place, kind_before, kind):
            found.append((kind_before, start, position - 1))
        if begins(before, place, kind_before, kind):
            start = position
        before, kind_before = place, kind
    return found


@given(st.lists(st.sampled_from(["O", *(f"{place}-{kind}" for place in "BIES" for kind in "XY")]), max_size=9))
def test_spans_are_those_of_seqeval(tags):
    assert spans_of(tags) == seqeval_entities(tags)


def test_plain_and_unit_tags_are_spans_too():
    assert spans_of(["X", "X", "O", "Y", "X"]) == [("X", 0, 1), ("Y", 3, 3), ("X", 4, 4)]
    assert spans_of(["U-X", "U-X", "B-X", "L-X", "I-X"]) == [("X", 0, 0), ("X", 1, 1), ("X", 2, 3), ("X", 4, 4)]
    assert count_strays(["I-X", "I-X", "O", "B-X", "I-Y", None]) == 2
    assert choose_tag("X", True, True, ["S-X", "B-X"]) == "S-X" and choose_tag("X", False, True, ["I-X"]) == "I-X"


def test_predicted_and_true_spans_are_counted_where_words_have_tags():
    names = ["O", "B-X", "I-X"]
    model = SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(names))))
    labels = torch.tensor([[-100, 1, -100, 2, 0, 1], [-100, 1, 0, 0, -100, -100]])
    predicted = torch.tensor([[1, 1, 0, 2, 0, 0], [0, 1, 2, 0, 1, 1]])
    outputs = Outputs(torch.nn.functional.one_hot(predicted, 3).float())
    found = TokenClassification().observe(model, outputs, {"labels": labels}, {})
    pairs = [json.loads(each) for each in found.pop("entity_pairs")]
    assert found == {"entities_found": [1, 0], "entities_predicted": [1, 1], "entities_true": [2, 1]}
    assert np.array(list(found.values())).sum() == 6
    assert pairs == [[["X", "X"], ["X", None]], [["X", None], [None, "X"]]]

"""Everyday inputs that once went wrong without a word: each with the right value, or a refusal."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from prepared import is_held_out, labels_of, prepared, texts_of, write_rows
from tiny import tiny_corpus, tiny_project
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from distill.data import TASKS, collate
from distill.data.prepare import prepare
from distill.data.rows import Order
from distill.data.summary import describe
from distill.errors import InputError
from distill.recipe.schema import Data
from distill.recipe.yaml import read_text


def words(count: int) -> list[str]:
    """As many texts of a few words, none twice."""
    chooser = random.Random(0)
    return [f"{' '.join(chooser.choices(('red', 'green', 'cat', 'dog'), k=4))} {number}" for number in range(count)]


def test_a_language_model_reads_each_document_behind_its_start_token(tmp_path):
    """A Llama-type tokenizer writes <s>; a teacher that is fed without it has another perplexity altogether."""
    names = ["<unk>", "<s>", "</s>", "red", "cat"]
    tokens = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    own = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, model_max_length=64, **own)
    chooser = random.Random(0)
    write_rows(tmp_path, {" ".join(chooser.choices(("red", "cat"), k=16)) for _ in range(122)})
    spec = Data(source="./data.jsonl", task="causal_lm", max_length=18)
    (tmp_path / "corpus").mkdir()
    corpus = prepare(Order(TASKS["causal_lm"](), spec, tokenizer, 0, tmp_path, packs=True), tmp_path / "corpus")
    batch = collate(corpus, corpus.train, range(len(corpus.train)))
    assert batch["input_ids"].shape[1] == 18  # one document fills a row: start, sixteen words, end
    assert (batch["input_ids"][:, 0] == 1).all() and (batch["input_ids"][:, -1] == 2).all()
    assert not (batch["input_ids"][:, 1:-1] <= 2).any()


@pytest.mark.parametrize("name", ["None", "NA", "N/A", "n/a", "null", "nan", "true", "1e5x"])
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_a_class_with_the_name_of_something_missing_is_a_class(name, ending, tmp_path):
    labels = [name] * 93 + ["Favor"] * 66 + ["Against"] * 41
    rows = [*zip(words(200), labels, strict=True)]
    if ending == "jsonl":
        write_rows(tmp_path, rows)
    else:
        mark = "," if ending == "csv" else "\t"
        lines = [f"text{mark}label", *(f"{text}{mark}{label}" for text, label in rows)]
        (tmp_path / f"data.{ending}").write_text("\n".join(lines))
    corpus = prepared(tmp_path, train=f"./data.{ending}")
    found = labels_of(corpus, "train") | labels_of(corpus, "test")
    assert found == dict(rows) and set(corpus.classes) == {name, "Favor", "Against"}


def test_prose_in_a_text_file_keeps_its_order_and_its_repetitions(tmp_path):
    paragraphs = [["the and of"] * 3 + [f"paragraph {number} ends"] for number in range(60)]
    text = "\n\n".join("\n".join(lines) for lines in paragraphs) + "\n"
    assert text.count("\n") == 299 and text.count("the and of") == 180
    (tmp_path / "data.txt").write_text(text)
    whole = {"train": "./data.txt", "task": "causal_lm", "max_length": 10**5}
    corpus = prepared(tmp_path, **whole)
    assert "".join(texts_of(corpus, "train") + texts_of(corpus, "test")) == text
    assert any("1 document is split by place" in line for line in describe(corpus.summary))
    rows = texts_of(prepared(tmp_path, **whole | {"max_length": 16}), "train")
    assert "".join(rows) == texts_of(corpus, "train")[0]  # cut into rows, one after the other


def test_decimal_numbers_do_not_become_classes(tmp_path):
    chooser = random.Random(0)
    write_rows(tmp_path, [(text, round(chooser.uniform(0, 5), 3)) for text in words(200)])
    try:
        assert prepared(tmp_path).head == "regression"
    except InputError as error:
        assert "numbers" in str(error)


def test_as_many_whole_numbers_as_rows_are_no_classes_either(tmp_path):
    write_rows(tmp_path, [(text, number) for number, text in enumerate(words(60))])
    with pytest.raises(InputError, match="60 classes for 60 labels"):
        prepared(tmp_path)


def test_rows_without_text_are_left_out_and_counted(tmp_path):
    rows = [(text, "ab"[number % 2]) for number, text in enumerate(words(120))]
    blank = [(text, "a") for text in ("", " ", "  ", "\t", "\n", "\u00a0", "\u2003", " \n ", "\r", "   ")]
    write_rows(tmp_path, rows + blank)
    corpus = prepared(tmp_path)
    assert corpus.summary["train"]["rows"] == {"read": 130, "empty": 10}
    assert min(corpus.train.lengths.min(), corpus.test.lengths.min()) > 10
    assert any("130 rows read (10 empty)" in line for line in describe(corpus.summary))
    write_rows(tmp_path, [text for text, _ in rows + blank])
    corpus = prepared(tmp_path, task="causal_lm")
    assert corpus.summary["train"]["rows"] == {"read": 130, "empty": 10}


def test_contradictions_and_an_unseen_class_are_said(tmp_path):
    texts = words(400)
    rare = [text for text in texts if is_held_out(text)][:3]
    rows = [(text, "rare" if text in rare else "ab"[number % 2]) for number, text in enumerate(texts)]
    rows += [(text, "ba"[number % 2]) for number, text in enumerate(texts[:53]) if text not in rare][:50]
    write_rows(tmp_path, rows)
    with pytest.raises(InputError, match=r"50 texts stand there with different labels, e\.g\. data\.jsonl, line"):
        prepared(tmp_path)
    corpus = prepared(tmp_path, contradictions="first")
    assert corpus.summary["train"]["rows"] == {"read": 450, "contradicting": 50}
    assert labels_of(corpus, "train") | labels_of(corpus, "test") == dict(rows[:400])
    said = [*describe(corpus.summary)]
    assert any("450 rows read (50 contradicting)" in line for line in said)
    assert "  no train example of the class 'rare'" in said


@pytest.mark.parametrize("labels", [(0, "0"), (1, "a"), (True, "True"), (True, 1), (["a"], "a"), (1.5, "a")])
def test_labels_of_several_kinds_are_refused(labels, tmp_path):
    write_rows(tmp_path, [(text, labels[number % 2]) for number, text in enumerate(words(60))])
    with pytest.raises(InputError, match="several kinds"):
        prepared(tmp_path)


ALIKE = [(0, 1), (True, False), ("0", "1"), ("a", "A"), ("a", " a"), ("👍", "א"), (-1, 10**40)]


@pytest.mark.parametrize("labels", ALIKE)
def test_labels_of_one_kind_are_classes_as_they_are_written(labels, tmp_path):
    rows = [(text, labels[number % 2]) for number, text in enumerate(words(60))]
    write_rows(tmp_path, rows)
    corpus = prepared(tmp_path)
    assert labels_of(corpus, "train") | labels_of(corpus, "test") == {text: str(label) for text, label in rows}


def test_the_length_that_cuts_is_that_of_the_recipe_and_counted(tmp_path):
    tiny_project(tmp_path)
    texts = [json.loads(line)["text"] for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    corpus = tiny_corpus(tmp_path, "data.max_length=7")
    cut = sum(own["truncated"] for own in corpus.summary.values())
    assert cut == sum(len(text.split()) > 7 for text in texts) > 0
    assert corpus.train.lengths.max() == 7


EXAMPLES = re.findall("```yaml\n(.*?)```", (Path(__file__).parents[2] / "docs/data.md").read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[0].strip("# ")[:40])
def test_every_example_of_the_documentation_is_a_section_data(example):
    spec = Data.model_validate(read_text(example, "docs/data.md").data["data"])
    assert spec.origins("train")

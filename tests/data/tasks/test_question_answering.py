"""Extractive answers: what files may say, windows of long contexts, and the way back from tokens to text."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from spans import RECIPE, characters, make_tokenizer, question_rows, spans_project
from tiny import tiny_batch, tiny_config, tiny_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from distill.cli import main
from distill.data import TrainingBatches, evaluation_batches, observe_batch
from distill.data.prepare import prepare
from distill.data.rows import Order
from distill.data.tasks.question_answering import LONGEST_ANSWER, QuestionAnswering, best_spans, read_answers
from distill.data.tasks.task import Settled
from distill.errors import InputError
from distill.evaluation.answers import exact_match_answer, f1_answer, normalized_words
from distill.evaluation.predict import predict
from distill.losses import Objective
from distill.models.forward import Outputs
from distill.models.load import ModelHead, random_model
from distill.recipe.schema import AllData, Data, Term


def prepared(folder, rows, tokenizer, **settings):
    """A corpus whose test split is one row of its own, unless the settings say otherwise."""
    spare = [{"question": "a", "context": "b", "answers": {"text": ["b"], "answer_start": [0]}}]
    for name, own in (("train", rows), ("test", settings.pop("test", spare))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    settings = {"train": "./train.jsonl", "test": "./test.jsonl", "max_length": 16, **settings}
    spec = Data(task="question_answering", **settings)
    return prepare(Order(QuestionAnswering(), spec, tokenizer, 0, folder), folder)


def letters():
    return make_tokenizer(list("abcdefghwyz"))


def row(context="a b c d", answers=None, question="w"):
    return {"question": question, "context": context, "answers": answers}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"text": ["c", "b c"], "answer_start": [4, 2]}, [["c", 4], ["b c", 2]]),
        ({"text": "c", "answer_start": 4}, [["c", 4]]),
        ([{"text": "c", "start": 4}], [["c", 4]]),
        ('{"text": ["c"], "answer_start": [4]}', [["c", 4]]),
        ('[{"text": "c", "start": 4}]', [["c", 4]]),
        ("c", [["c", None]]),
        ("[1]", [["[1]", None]]),
        ("[note", [["[note", None]]),
        (["c", "d"], [["c", None], ["d", None]]),
        ({"text": [], "answer_start": []}, []),
        ([], []),
        ("[]", []),
        (None, None),
        ("", None),
    ],
)
def test_answers_are_read_in_every_common_form(value, expected):
    assert read_answers(value) == expected


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"text": ["c"], "answer_start": [2]}, "answer_start 2 says 'b', not the answer 'c', which is at 4"),
        ({"text": ["c"], "answer_start": [-3]}, "answer_start -3 says '', not the answer 'c'"),
        ({"text": ["x"], "answer_start": [2]}, "not the answer 'x', which is not in the context"),
        ("x", "the answer 'x' is not in the context; an empty list says that there is none"),
        ("{'text': ['b']}", """the answer "{'text': ['b']}" is not in the context; a list or an object must be JSON"""),
        ({"text": ["c", "d"], "answer_start": [4]}, "has lists of different lengths, 2 of text and 1 of answer_start"),
        ({"text": ["c"], "answer_start": ["4"]}, "has an answer_start that is no whole number, '4'"),
        ({"text": [" "], "answer_start": [1]}, "has an answer without text"),
        ({"text": [], "start_byte": []}, "has text, start_byte where text and answer_start must be"),
        ({}, "has nothing where text and answer_start must be"),
        ([{"start": 4}], "has start where text and answer_start must be"),
        (7, "is neither a text, a list of answers nor an object"),
        ([7], "has an answer that is neither a text nor an object"),
    ],
)
def test_answers_that_are_not_in_their_context_are_refused_with_file_and_row(answers, said, tmp_path):
    with pytest.raises(InputError, match=r"data\.train: .*train\.jsonl, line 2: ") as caught:
        prepared(tmp_path, [row(answers="b"), row("a b c d", answers)], letters())
    assert said in str(caught.value)


def examples_of(corpus, split="train"):
    taken = corpus.splits[split].take(range(len(corpus.splits[split])))
    lists = {name: list(values) if hasattr(values, "flat") else values for name, values in taken.items()}
    return [
        {name: each.tolist() if hasattr(each, "tolist") else each for name, each in zip(lists, own, strict=True)}
        for own in zip(*lists.values(), strict=True)
    ]


def test_a_long_context_is_read_in_windows_and_an_answer_is_a_label_where_all_of_it_is(tmp_path):
    rows = [row("a b c d e f g h", {"text": ["d e"], "answer_start": [6]})]
    corpus = prepared(tmp_path, rows, letters(), max_length=8, stride=2)
    # [CLS] w [SEP] and [SEP] leave room for four letters, two of which are new.
    found = examples_of(corpus)
    assert [each["text"] for each in found] == ["a b c d", "c d e f", "e f g h"]
    assert [each["span"] for each in found] == [[0, 0], [4, 5], [0, 0]]  # d e is whole in the second one only
    assert [each["row"] for each in found] == [0, 0, 0]
    assert found[1]["starts"] == [-1, -1, -1, 0, 2, 4, 6, -1] and found[1]["ends"] == [-1, -1, -1, 1, 3, 5, 7, -1]
    assert {each["gold"] for each in found} == {'["d e"]'} and {each["null_at"] for each in found} == {0}
    assert corpus.summary["train"]["notes"] == {"contexts read in several windows": 1}
    assert corpus.summary["train"]["used"] == 1 and corpus.summary["train"]["examples"] == 3


def test_a_quarter_of_the_length_is_shared_by_windows_unless_the_recipe_says_more(tmp_path):
    corpus = prepared(tmp_path, [row("a b c d e f g h", "a")], letters(), max_length=8)
    assert [each["text"] for each in examples_of(corpus)] == ["a b c d", "c d e f", "e f g h"]


def test_what_happened_to_answers_is_counted(tmp_path):
    rows = [
        row("a b c a", "a"),
        row("a b c d", "b", "y"),
        row("a b", [], "z"),
        row("a b c d e", "e", "a b c d e f"),
        row(" ".join("ab" * 20), " ".join("ab" * 16), "h"),
        row("a b c", None, "h"),
        row("a \u200b", "\u200b", "z z"),
    ]
    tokenizer = letters()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", " ")
    corpus = prepared(tmp_path, rows, tokenizer, max_length=48, stride=39)
    assert corpus.summary["train"]["notes"] == {
        "rows left out: the question leaves no room for the context": 1,
        "answers without their place: the first one in the context is taken": 3,
        "of these, answers that stand there several times": 1,
        "questions without an answer": 1,
        f"answers of more than {LONGEST_ANSWER} tokens, never given whole": 1,
        "rows left out: the tokenizer writes nothing of the answer": 1,
    }
    assert sorted(each["span"] for each in examples_of(corpus)) == [[-100, -100], [0, 0], [3, 3], [3, 34], [4, 4]]
    assert corpus.settled.may_lack_answers
    assert [int(each) for each in corpus.train.labelled].count(0) == 1


def test_answers_that_tokens_do_not_give_and_several_are_counted(tmp_path):
    def notes(answers, **settings):
        rows = [{"question": "w", "context": "a bc d", "answers": answers}]
        corpus = prepared(tmp_path, rows, make_tokenizer(["w", "a", "bc", "d", "b"]), **settings)
        return corpus.summary["train"]["notes"], corpus

    place = {"text": ["b"], "answer_start": [2]}
    assert notes(place)[0] == {"answers that begin or end inside a token, never given exactly": 1}
    assert notes({"text": ["bc d", "bc"], "answer_start": [2, 2]})[0] == {
        "questions with several answers: the first is learned, and any is right": 1
    }
    assert notes({"text": [" bc"], "answer_start": [1]})[0] == {}


def test_a_set_with_questions_without_an_answer_does_not_teach_the_model_to_give_none(tmp_path):
    rows = {"train": [row(answers="b")], "test": [row("b a", "b")], "set": [row("c d", []), row("d c", "d")]}
    for name, own in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in own))
    given = {"train": "./train.jsonl", "test": "./test.jsonl", "sets": {"more": "./set.jsonl"}}
    spec = AllData.model_validate({"task": "question_answering", "max_length": 16, **given})
    corpus = prepare(Order(QuestionAnswering(), spec, letters(), 0, tmp_path), tmp_path)
    assert not corpus.settled.may_lack_answers
    note = "questions without an answer, which the model gives never, as no other split has any"
    assert corpus.summary["sets.more"]["notes"][note] == 1


def test_questions_of_which_none_has_an_answer_are_refused(tmp_path):
    with pytest.raises(InputError, match="no question has an answer"):
        prepared(tmp_path, [row(answers=[])], letters(), test=[row("b", [])])


def test_an_answer_that_lies_across_all_windows_is_counted(tmp_path):
    rows = [row("a b c d e f g h", "b c d e f"), row("a b c d e f g h", "a b", "y")]
    corpus = prepared(tmp_path, rows, letters(), max_length=8, stride=1)
    assert corpus.summary["train"]["notes"]["answers that no window holds whole: a larger data.stride would"] == 1


def test_a_tokenizer_that_does_not_tell_characters_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"ByT5Tokenizer.* is a slow one"):
        prepared(tmp_path, [row(answers="b")], transformers.ByT5Tokenizer(model_max_length=64), max_length=64)


def test_strides_are_for_questions_and_shorter_than_a_window(tmp_path, capsys):
    path = spans_project(tmp_path, question_rows(4))
    assert main(["validate", str(path), "data.stride=20"]) == 2
    assert "data.stride" in (said := capsys.readouterr().err) and "is not less than max_length: 20" in said
    assert main(["validate", str(path), "data.stride=6", "data.task=causal_lm"]) == 2
    assert "it is for question_answering" in capsys.readouterr().err


def test_the_best_span_is_that_of_a_search_through_all_of_them():
    draws = np.random.default_rng(0)
    start, end = draws.normal(size=(2, 5, 40))
    inside = draws.random((5, 40)) < 0.7
    first, last, score = best_spans(start, end, inside)
    for b, (s, e, ok) in enumerate(zip(start, end, inside, strict=True)):
        pairs = [(i, j) for i, j in itertools.product(range(40), repeat=2) if i <= j < i + LONGEST_ANSWER]
        best = max((pair for pair in pairs if ok[pair[0]] and ok[pair[1]]), key=lambda pair: s[pair[0]] + e[pair[1]])
        assert (first[b], last[b]) == best and score[b] == pytest.approx(s[best[0]] + e[best[1]])


WINDOWS = {
    "example": np.array([0, 1, 2, 3]),
    "row": np.array([0, 0, 4, 4]),
    "answers": np.array(["ada", "in 1843", "red", "blue"]),
    "answer_score": np.array([1.0, 3.0, 2.0, 1.5]),
    "null_score": np.array([5.0, 2.0, 4.0, 2.5]),
    "gold": np.array(['["in 1843"]', '["in 1843"]', "[]", "[]"]),
    "nll": np.array([0.5, 0.25, 1.0, 2.0]),
    "tokens": np.array([2, 2, 2, 2]),
}


@pytest.mark.parametrize(("may_lack", "answers"), [(True, ["in 1843", ""]), (False, ["in 1843", "red"])])
def test_the_windows_of_a_row_give_one_answer_and_none_only_where_data_have_questions_without(may_lack, answers):
    found = QuestionAnswering().finish(WINDOWS, Settled("span", may_lack_answers=may_lack))
    assert found["answers"].tolist() == answers
    assert found["null_score"].tolist() == [2.0, 2.5] and found["answer_score"].tolist() == [3.0, 2.0]
    assert found["example"].tolist() == [0, 2] and found["row"].tolist() == [0, 4]
    assert found["nll"].tolist() == [0.75, 3.0] and found["tokens"].tolist() == [4, 4]
    assert found["tokens"].dtype == np.int64 and set(found) == set(WINDOWS)


CHINESE = "北京是中国的首都。上海在长江口,人口两千多万。北京在2008年办过奥运会,上海在2010年办过世博会。"
ENGLISH = "ada wrote the first program in 1843 . mary wrote a book about a monster in 1818 , at lake geneva ."


def byte_level(_text):
    """A tokenizer whose tokens are bytes: letters of other alphabets take several."""
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=4)}
    special = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    backend = Tokenizer(models.BPE(special | alphabet, [], unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"cls_token": "[CLS]", "pad_token": "[PAD]", "unk_token": "[UNK]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names)


CASES = {
    "words": (
        lambda text: make_tokenizer(sorted({*text.split()})),
        ENGLISH,
        ["in 1818", "ada", "lake geneva", None],
        (16, 4),
    ),
    "bytes": (byte_level, CHINESE, ["首都", "千多", "2010年", None], (30, 12)),
    "characters": (characters, CHINESE, ["首都", "两千多万", "2010年", None], (16, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_is_right_about_every_window_gives_the_texts_of_the_answers(case, tmp_path):
    make, context, texts, (length, stride) = CASES[case]
    rows = [row(context, [] if text is None else text, f"{'ab'[n % 2]} " * (n + 1)) for n, text in enumerate(texts)]
    tokenizer = make(f"{context} a b")
    corpus = prepared(tmp_path, [row("a b", "a")], tokenizer, test=rows, max_length=length, stride=stride)
    assert len(corpus.test) > 3 * len(rows)
    model = tiny_model("bert")
    parts = []
    for batch in evaluation_batches(corpus, corpus.test, 5):
        logits = torch.zeros(len(batch["labels"]), 2, batch["input_ids"].shape[1])
        logits.scatter_(2, batch["labels"][:, :, None], 9.0)
        seen = observe_batch(corpus, corpus.test, model, Outputs(logits), batch)
        parts.append({"example": batch["examples"].numpy()} | {name: np.asarray(own) for name, own in seen.items()})
    order = np.argsort(np.concatenate([part["example"] for part in parts]))
    columns = {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}
    found = corpus.task.finish(columns, corpus.settled)
    given = dict(zip(found["gold"].tolist(), found["answers"].tolist(), strict=True))
    assert given == {json.dumps([text] if text else [], ensure_ascii=False): text or "" for text in texts}
    assert exact_match_answer(found["answers"], found["gold"]) == 1.0


def test_padding_takes_no_part_and_a_window_without_a_label_no_loss(tmp_path):
    rows = [row("a b c d", "c"), row("a b c d e f", None, "y"), row("a b", "b", "z")]
    corpus = prepared(tmp_path, rows, letters(), max_length=16)
    config = transformers.BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.BertForQuestionAnswering(config).eval()
    (batch,) = evaluation_batches(corpus, corpus.train, 8)
    assert batch["labels"].tolist() == [[-100, -100], [5, 5], [4, 4]] and batch["token_type_ids"].max() == 1
    found = predict(model, [batch], "span")
    assert len(found["example"]) == 2
    for place in (1, 2):
        length = int(batch["attention_mask"][place].sum())
        own = {name: batch[name][place : place + 1, :length] for name in ("input_ids", "token_type_ids")}
        ends = dict(zip(("start_positions", "end_positions"), batch["labels"][place].reshape(2, 1), strict=True))
        with torch.no_grad():
            expected = model(**own, **ends).loss.item()  # the mean of both ends, of this example alone
        at = found["example"].tolist().index(int(batch["examples"][place]))
        assert found["nll"][at] / 2 == pytest.approx(expected, rel=1e-5)
    objective = Objective([Term(match="labels")], "span")
    assert objective.counts([batch]).tolist() == [4]
    assert len(TrainingBatches(corpus, corpus.labelled, 2, 2, 0).pool) == 2


def test_a_teacher_of_three_classes_gets_a_head_of_two_ends(tmp_path):
    tiny_config("bert", num_labels=3).save_pretrained(tmp_path)
    task = QuestionAnswering()
    model = random_model(tmp_path, ModelHead(task.auto_class, settings=task.model_settings(Settled("span"))), 0)
    assert model.qa_outputs.out_features == 2
    output = model(**tiny_batch())
    assert output.start_logits.shape == output.end_logits.shape == (3, 10)


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel  tower"], 1, 1),
        ("in the year 1843", ["1843", "the year 1843"], 0, 0.8),  # in year 1843 | year 1843: 2 of 3 and of 2
        ("Ada", ["Bob"], 0, 0),
        ("", [], 1, 1),
        ("Ada", [], 0, 0),
        ("", ["Ada"], 0, 0),
        ("北京市", ["北京"], 0, 0.8),
        ("《红楼梦》", ["红楼梦"], 1, 1),
        ("กรุงเทพ", ["กรุงเทพ"], 1, 1),
    ],
)
def test_answers_are_scored_as_squad_does_and_by_characters_in_scripts_without_spaces(answer, gold, exact, f1):
    columns = [answer, "x"], [json.dumps(gold), '["x"]']
    assert exact_match_answer(*columns) == (exact + 1) / 2
    assert f1_answer(*columns) == pytest.approx((f1 + 1) / 2)


def test_dashes_between_latin_words_stay_as_in_squad():
    assert normalized_words("1939\u20131945") == ["1939\u20131945"] and normalized_words("1939-1945") == ["19391945"]


@pytest.mark.slow
def test_a_student_learns_to_answer_from_its_teacher_and_stock_transformers_answers_with_it(tmp_path, capsys):
    recipe = RECIPE.replace("max_length: 20", "max_length: 20, stride: 6")
    path = spans_project(tmp_path, question_rows(800), recipe)
    watched = ["training.evaluate_every=50", "training.keep_best=f1_answer", "evaluation.efficiency=true"]
    assert main(["run", str(path), *watched, "--out", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run/evaluation.json").read_text())
    arms = {arm["name"]: arm["metrics"] for arm in found["arms"]}
    assert found["data"]["examples"] == found["data"]["summary"]["test"]["used"] < len(question_rows(800)) / 4
    assert arms["teacher"]["exact_match_answer"] > 0.9
    assert arms["distilled"]["exact_match_answer"] > arms["cut"]["exact_match_answer"]
    assert arms["distilled"]["kl"] < 0.1 * arms["cut"]["kl"]
    release = tmp_path / "run/release"
    card = (release / "README.md").read_text()
    code = re.search(r"## Use.*?```python\n(.*?)```", card, re.DOTALL)[1]
    assert "pipeline_tag: question-answering" in card and "AutoModelForQuestionAnswering" in code
    code = code.replace('"tiny-spans"', repr(str(release)))
    code = re.sub(r"tokenizer\(.*?, return", 'tokenizer("which city", "two red oslo one", return', code)
    code += "\nimport sys; assert 'distill' not in sys.modules"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "oslo", done.stderr

"""Relations between two marked spans: the markers, what is cut, the tokenizer and embeddings that get them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from spans import RECIPE, characters, make_tokenizer, relation_rows, spans_project, words
from tiny import tiny_config, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distill.cli import main
from distill.data.prepare import prepare
from distill.data.rows import Order
from distill.data.tasks.relation_extraction import RelationExtraction, find_none_class, mark, read_relation, read_span
from distill.data.tasks.spans import SPLIT_WORD
from distill.data.tasks.task import Encoder, Settled
from distill.errors import InputError
from distill.evaluation.metrics import compute
from distill.models.load import add_tokens, grow_embeddings, load_tokenizer
from distill.recipe.schema import Data

MARKERS = RelationExtraction.added_tokens
RELATIONS = RECIPE.replace("question_answering", "relation_extraction").replace("tiny-spans", "tiny-relations")


def row(text="a b c d", head=(0, 1), tail=(4, 5), relation="r"):
    return {"text": text, "head": list(head), "tail": list(tail), "relation": relation}


def marked(tokenizer):
    add_tokens(tokenizer, MARKERS)
    return tokenizer


def letters():
    return marked(make_tokenizer(list("abcdefgh")))


def prepared(folder, rows, tokenizer, **settings):
    """A corpus whose test split is two rows of their own."""
    spare = [row("g h", (0, 1), (2, 3), "r"), row("h g", (0, 1), (2, 3), "none")]
    for name, own in (("train", rows), ("test", spare)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in own))
    settings = {"train": "./train.jsonl", "test": "./test.jsonl", "max_length": 16, **settings}
    spec = Data(task="relation_extraction", **settings)
    return prepare(Order(RelationExtraction(), spec, tokenizer, 0, folder), folder)


def texts_of(corpus, tokenizer):
    return sorted(" ".join(tokenizer.convert_ids_to_tokens(corpus.train[n].tolist())) for n in range(len(corpus.train)))


@pytest.mark.parametrize("value", [[2, 5], {"start": 2, "end": 5}, "[2, 5]", '{"start": 2, "end": 5}'])
def test_spans_are_read_in_every_common_form(value):
    assert read_span(value) == [2, 5]


@pytest.mark.parametrize("value", [None, "", "2:5", [2], [2, 5, 7], [2.0, 5.0], [True, 5], {"start": 2}, 2, ["2", "5"]])
def test_what_is_no_span_is_refused(value):
    with pytest.raises(ValueError, match="is no span"):
        read_span(value)


def test_spans_that_cut_a_word_are_counted(tmp_path):
    rows = [row(f"a b{letter * 2} c", (2, 4), (0, 1)) for letter in "def"]
    corpus = prepared(tmp_path, rows, marked(characters("abcdefgh")))
    assert corpus.summary["train"]["notes"][SPLIT_WORD] == 3


def test_relations_are_texts_or_whole_numbers():
    assert [read_relation(value) for value in ("r", 3, 0, None, "", " ")] == ["r", "3", "0", None, None, None]
    for value in (1.5, True, ["r"]):
        with pytest.raises(ValueError, match="is no class"):
            read_relation(value)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (row(tail=(4, 9)), "tail [4, 9] is no span of a text of 7 characters"),
        (row(head=(-1, 1)), "head [-1, 1] is no span of a text of 7 characters"),
        (row(head=(3, 3)), "head [3, 3] is no span"),
        (row(head=(2, 1)), "head [2, 1] is no span"),
        (row(head=(1, 2)), "head [1, 2] holds nothing but space"),
        (row(head=(2, 5)), "head [2, 5] 'b c' and tail [4, 5] 'c' overlap"),
        (row(head=(4, 5)), "head [4, 5] 'c' and tail [4, 5] 'c' overlap"),
        (row("a [E1] c d", (0, 1), (7, 8)), "the text holds [E1], which would mark a span"),
        (row(head="0-1"), "column 'head' is no span"),
        (row(relation=[1]), "column 'relation' is no class"),
    ],
)
def test_spans_that_cannot_be_marked_are_refused_with_file_and_row(broken, said, tmp_path):
    with pytest.raises(InputError, match=r"data\.train: .*train\.jsonl, line 2: ") as caught:
        prepared(tmp_path, [row(relation="none"), broken], letters())
    assert said in str(caught.value)


def numbered(relations):
    return [row(f"a b {'c ' * count}d", (0, 1), (2, 3), relations[count % len(relations)]) for count in range(24)]


def test_numbers_of_relations_are_ordered_and_named_as_classes_are(tmp_path):
    rows = numbered(range(11))
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    spare = {"train": "./own.jsonl", "test": None, "max_length": 64}
    assert prepared(tmp_path, rows, letters(), **spare).classes == tuple(map(str, range(11)))  # 2 before 10
    corpus = prepared(tmp_path, rows, letters(), **spare, classes=["none", *"abcdefghij"])
    assert corpus.classes == ("none", *"abcdefghij")
    assert sum(own["classes"]["none"] for own in corpus.summary.values()) == 3
    given = Order(
        RelationExtraction(),
        Data(source="./own.jsonl", task="relation_extraction", max_length=64),
        letters(),
        0,
        tmp_path,
        own_order=lambda settled: replace(settled, classes=tuple(f"LABEL_{n}" for n in range(11))),
    )
    assert sum(own["classes"]["LABEL_10"] for own in prepare(given, tmp_path).summary.values()) == 2


def test_as_many_relations_as_rows_are_none(tmp_path):
    with pytest.raises(InputError, match=r"26 classes for 26 labels.*check data\.columns"):
        prepared(tmp_path, numbered([f"r{number}" for number in range(24)]), letters(), max_length=64)


def test_spans_of_a_csv_file_are_json(tmp_path):
    (tmp_path / "all.csv").write_text(
        'text,head,tail,relation\na b c,"[0, 1]","{""start"": 4, ""end"": 5}",r\nc b a,"[4, 5]","[0, 1]",none\n'
        'd b a,"[4, 5]","[0, 1]",r\n'
    )
    tokenizer = letters()
    corpus = prepared(tmp_path, [], tokenizer, train="./all.csv")
    assert texts_of(corpus, tokenizer) == [
        "[CLS] [E1] a [/E1] b [E2] c [/E2] [SEP]",
        "[CLS] [E2] c [/E2] b [E1] a [/E1] [SEP]",
        "[CLS] [E2] d [/E2] b [E1] a [/E1] [SEP]",
    ]


def test_markers_say_which_span_is_which_on_either_side():
    assert mark("Ada met Mary.", (0, 3), (8, 12)) == "[E1] Ada [/E1] met [E2] Mary [/E2]."
    assert mark("Ada met Mary.", (8, 12), (0, 3)) == "[E2] Ada [/E2] met [E1] Mary [/E1]."
    assert mark("北京是首都", (0, 2), (3, 5)) == "[E1]北京[/E1]是[E2]首都[/E2]"


def test_the_tokens_of_a_row_tell_nothing_of_its_label():
    rows = relation_rows(300)
    tokenizer, spec = marked(words()), Data(source="./x.jsonl", task="relation_extraction", max_length=20)
    labels = sorted({each["relation"] for each in rows})

    def encoded(own):
        columns = {name: [each[name] for each in own] for name in RelationExtraction.columns}
        return RelationExtraction().encode(columns, Encoder(tokenizer, spec, Settled("sequence", tuple(labels))))

    found = encoded(rows)
    turned = encoded([{**each, "relation": labels[labels.index(each["relation"]) - 1]} for each in rows])
    hidden = encoded([{**each, "relation": None} for each in rows])
    assert found["input_ids"] == turned["input_ids"] == hidden["input_ids"] and found["row"] == turned["row"]
    assert found["label"] != turned["label"] and set(hidden["label"]) == {-100} and not any(hidden["labelled"])
    swapped = encoded([{**each, "head": each["tail"], "tail": each["head"]} for each in rows])
    ids = tokenizer.convert_tokens_to_ids(list(MARKERS))
    other = dict(zip(ids, ids[2:] + ids[:2], strict=True))
    assert swapped["input_ids"] == [[other.get(token, token) for token in own] for own in found["input_ids"]]
    assert all(Counter(own)[marker] == 1 for own in found["input_ids"] for marker in ids)


def test_a_long_text_is_cut_around_its_spans_and_left_out_where_they_are_too_far_apart(tmp_path):
    text, tokenizer = "a b c d e f g h a b c d", letters()
    rows = [
        row(text, (8, 9), (12, 13), "r"),  # e, g: seven tokens with markers, and one more on each side
        row(text, (0, 1), (2, 3), "none"),
        row(text, (22, 23), (20, 21), "r"),
        row(text, (0, 1), (12, 13), "r"),  # a to g are eleven
        row("a b", (0, 1), (2, 3), "r"),
    ]
    corpus = prepared(tmp_path, rows, tokenizer, max_length=11)
    assert texts_of(corpus, tokenizer) == [
        "[CLS] [E1] a [/E1] [E2] b [/E2] [SEP]",
        "[CLS] [E1] a [/E1] [E2] b [/E2] c d e [SEP]",
        "[CLS] d [E1] e [/E1] f [E2] g [/E2] h [SEP]",
        "[CLS] h a b [E2] c [/E2] [E1] d [/E1] [SEP]",
    ]
    summary = corpus.summary["train"]
    assert summary["truncated"] == 3 and summary["examples"] == 4 and summary["used"] == 5
    assert summary["notes"] == {
        "rows left out: max_length does not reach from one span to the other": 1,
        "rows without a relation, of the class 'none', which f1_relations leaves out": 1,
    }


def test_a_split_of_which_every_row_is_left_out_is_refused(tmp_path):
    with pytest.raises(InputError, match="no example is left of the train split"):
        prepared(tmp_path, [row("a b c d e f g h", (0, 1), (14, 15))], letters(), max_length=9)


def byte_level():
    """Tokens of GPT-2's form: a word with the space before it."""
    words = ["ada", "mary", "met", *(f"\u0120{word}" for word in ("ada", "mary", "met")), "\u0120", "."]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="."))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return marked(PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=".", model_max_length=64))


def test_markers_leave_the_tokens_of_a_byte_level_tokenizer_as_they_were():
    tokenizer = byte_level()
    text = mark("ada met mary.", (0, 3), (8, 12))
    kept = [token for token in tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) if token not in MARKERS]
    assert kept == ["\u0120ada", "\u0120met", "\u0120mary", "."]
    assert tokenizer.tokenize(" ada met mary.") == kept


def test_chinese_texts_are_marked_by_characters(tmp_path):
    tokenizer = marked(characters("北京是中国的首都。"))
    rows = [row("北京是中国的首都。", (0, 2), (3, 5), "r"), row("中国的首都是北京。", (6, 8), (0, 2), "none")]
    corpus = prepared(tmp_path, rows, tokenizer, max_length=20)
    assert texts_of(corpus, tokenizer) == [
        "[CLS] [E1] 北 京 [/E1] 是 [E2] 中 国 [/E2] 的 首 都 。 [SEP]",
        "[CLS] [E2] 中 国 [/E2] 的 首 都 是 [E1] 北 京 [/E1] 。 [SEP]",
    ]


def test_markers_stay_with_a_saved_tokenizer_and_are_not_added_twice(tmp_path):
    tokenizer = words()
    before = len(tokenizer)
    assert add_tokens(tokenizer, MARKERS) == list(MARKERS) and len(tokenizer) == before + 4
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert add_tokens(again, MARKERS) == [] and len(again) == before + 4
    text = "[E1] cat [/E1] in [E2] rome [/E2]"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("family", ["bert", "distilbert", "bart", "gpt2", "llama"])
def test_new_tokens_get_embeddings_of_their_own_and_the_old_ones_stay(family):
    said, tokenizer = [], marked(make_tokenizer([f"w{number}" for number in range(60)]))
    model = tiny_model(family)
    before = model.get_input_embeddings().weight.clone()
    grow_embeddings(model, tokenizer, MARKERS, 3, said.append)
    after = model.get_input_embeddings().weight
    assert torch.equal(after[:64], before) and after.shape == (68, before.shape[1])
    assert model.config.vocab_size == 68 and len(torch.unique(after[64:], dim=0)) == 4
    assert said == ["  drawn at random, to be fitted: the embeddings of [E1], [/E1], [E2], [/E2]"]
    grow_embeddings(model, tokenizer, MARKERS, 3, said.append)
    assert len(said) == 1 and torch.equal(model.get_input_embeddings().weight, after)


@pytest.mark.parametrize(
    ("classes", "name", "found"),
    [
        (("eats", "none"), None, 1),
        (("NA", "eats"), None, 0),
        (("Other", "no_relation"), "Other", 0),
        (("eats", "none"), "eats", 0),
        (("eats", "none"), "", None),
        (("eats", "likes"), None, None),
    ],
)
def test_the_class_without_a_relation_is_found_by_its_name(classes, name, found):
    assert find_none_class(classes, name) == found


def test_a_class_without_a_relation_that_is_not_there_or_not_the_only_one_is_refused():
    with pytest.raises(InputError, match=r"data\.none_class: there is no class 'non'; there are eats, none"):
        find_none_class(("eats", "none"), "non")
    with pytest.raises(InputError, match="Other and no_relation may both stand for no relation; name one"):
        find_none_class(("Other", "eats", "no_relation"), None)


def test_f1_of_relations_leaves_out_the_class_of_none_and_keeps_its_mistakes():
    columns = {
        "predictions": np.array([0, 0, 1, 2, 1, 0]),
        "references": np.array([0, 1, 1, 2, 2, 2]),
        "none_class": np.full(6, 2),
    }
    # Class 0: 2·1 of 3 + 1; class 1: 2·1 of 2 + 2; class 2, none: 2·1 of 1 + 3.
    assert compute(["f1_macro", "f1_relations"], columns) == {"f1_macro": 0.5, "f1_relations": 0.5}
    columns["predictions"] = np.array([0, 1, 1, 0, 2, 2])
    # Class 0: 2·1 of 2 + 1; class 1: 2·2 of 2 + 2; none: 2·2 of 2 + 3.
    found = compute(["f1_macro", "f1_relations"], columns)
    assert found["f1_relations"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["f1_macro"] == pytest.approx((2 / 3 + 1 + 4 / 5) / 3)
    columns["none_class"] = np.full(6, -100)
    assert compute(["f1_relations"], columns)["f1_relations"] == found["f1_macro"]


def ready_project(folder, tokenizer):
    """A teacher that is trained, as far as its files tell, for the relations of `relation_rows`."""
    path = spans_project(folder, relation_rows(300), RELATIONS)
    tokenizer.save_pretrained(folder / "teacher")
    names = {"id2label": dict(enumerate(["eats", "lives_in", "none"]))}
    model = tiny_model("bert", vocab_size=len(tokenizer), num_hidden_layers=3, **names)
    model.save_pretrained(folder / "teacher")
    return path, ["teacher.init=pretrained", "teacher.fit=null"]


def test_a_trained_teacher_that_never_saw_the_markers_is_refused(tmp_path, capsys):
    path, ready = ready_project(tmp_path, words())
    assert main(["run", str(path), *ready, "--out", str(tmp_path / "run")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "writes [E1], [/E1], [E2], [/E2], which the teacher's tokenizer lacks" in said and "add `fit:" in said


def test_a_trained_teacher_with_the_markers_keeps_them(tmp_path, capsys):
    path, ready = ready_project(tmp_path, marked(words()))
    before = (tmp_path / "teacher/model.safetensors").read_bytes()
    assert main(["build", str(path), *ready, "--out", str(tmp_path / "run")]) == 0
    assert "embeddings of" not in capsys.readouterr().err
    assert (tmp_path / "teacher/model.safetensors").read_bytes() == before
    assert json.loads((tmp_path / "run/student/config.json").read_text())["vocab_size"] == 38


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused_whatever_is_added(tmp_path, capsys):
    path = spans_project(tmp_path, relation_rows(60), RELATIONS)
    tiny_config("bert", vocab_size=30, pad_token_id=0).save_pretrained(tmp_path / "teacher")
    assert main(["plan", str(path), "--out", str(tmp_path / "run")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "tokenizer.json has words up to id 33, and config.json says vocab_size 30" in said


@pytest.mark.slow
def test_a_student_learns_relations_from_its_teacher_and_stock_transformers_finds_them_in_one_line(tmp_path, capsys):
    recipe = RELATIONS.replace("steps: 150, batch_size: 32, lr: 1e-3", "steps: 250, batch_size: 32, lr: 2e-3")
    path = spans_project(tmp_path, relation_rows(1200), recipe)
    watched = ["training.evaluate_every=50", "training.keep_best=f1_relations"]
    assert main(["run", str(path), *watched, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert said.count("the teacher's tokenizer gets [E1], [/E1], [E2], [/E2], as task: relation_extraction") == 1
    assert "drawn at random, to be fitted: the embeddings of [E1], [/E1], [E2], [/E2]" in said
    assert "of the class 'none', which f1_relations leaves out" in said
    found = json.loads((tmp_path / "run/evaluation.json").read_text())
    arms = {arm["name"]: arm["metrics"] for arm in found["arms"]}
    assert arms["teacher"]["accuracy"] > 0.9
    assert arms["distilled"]["f1_relations"] > arms["cut"]["f1_relations"]
    assert arms["distilled"]["kl"] < 0.5 * arms["cut"]["kl"]
    release = tmp_path / "run/release"
    assert len(AutoTokenizer.from_pretrained(release)) == len(words()) + 4
    assert '"[E1] Marie Curie [/E1] was born in [E2] Warsaw [/E2]."' in (release / "README.md").read_text()
    text = "one [E2] rome [/E2] two [E1] cat [/E1]"
    code = (
        f"from transformers import pipeline\nprint(pipeline('text-classification', {str(release)!r})({text!r}))\n"
        "import sys; assert 'distill' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert re.search("'label': 'lives_in'", done.stdout), done.stderr

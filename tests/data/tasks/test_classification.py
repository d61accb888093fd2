"""Labels decide what is predicted: classes, sets of classes or numbers; and what is said about them."""

from __future__ import annotations

import csv
import json
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import tiny_config, tiny_model, tiny_project
from transformers import AutoModelForSequenceClassification

from distill.data import TASKS
from distill.data.batches import collate
from distill.data.prepare import prepare
from distill.data.rows import Order
from distill.data.summary import describe
from distill.data.tasks.classification import head_of, read_label
from distill.errors import InputError
from distill.models.forward import Capture, forward
from distill.models.load import ModelHead, load_config, load_model, load_tokenizer, random_model
from distill.pipeline import RunDir, Session, calibrate, evaluate, run_stages, train
from distill.pipeline import data as stage
from distill.recipe import load_recipe
from distill.recipe.schema import Data

WORDS = ("red", "green", "blue", "cat", "dog", "fish", "runs", "sleeps")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny_project(folder)
    return load_tokenizer(folder / "teacher")


def texts(count):
    return [f"{WORDS[i % 8]} {WORDS[i // 8 % 8]} {WORDS[i // 64]}" for i in range(count)]


def corpus_of(tmp_path, tokenizer, rows, name="data.jsonl", **changes):
    path = tmp_path / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name.endswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    spec = Data(source=f"./{name}", task="classification", max_length=16, **changes)
    folder = tmp_path / "corpus"
    folder.mkdir(exist_ok=True)
    return prepare(Order(TASKS["classification"](), spec, tokenizer, 0, tmp_path), folder)


def labels_of(corpus, split="train"):
    examples = getattr(corpus, split)
    return collate(corpus, examples, range(len(examples)))["labels"]


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.tsv", "data.parquet"])
def test_no_word_stands_for_a_missing_class_or_a_missing_text(tmp_path, tokenizer, name):
    words = ["None", "NA", "N/A", "null", "nan"]
    rows = [{"text": text, "label": words[i % 5]} for i, text in enumerate([*words, *texts(55)])]
    corpus = corpus_of(tmp_path, tokenizer, rows, name)
    assert corpus.classes == tuple(sorted(words)) and corpus.settled.about == "5 classes"
    assert len(corpus.train) + len(corpus.test) == 60 and corpus.train.labelled.all()


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.parquet"])
def test_decimal_numbers_are_a_regression_also_where_some_are_round(tmp_path, tokenizer, name):
    values = [round(0.1 + i * 0.037, 3) for i in range(59)]
    rows = [{"text": text, "label": value} for text, value in zip(texts(60), [*values, 5.0], strict=True)]
    corpus = corpus_of(tmp_path, tokenizer, rows, name)
    assert corpus.head == "regression" and corpus.classes == ()
    assert corpus.settled.about == "numbers from 0.1 to 5, so this is a regression"
    found = torch.cat([labels_of(corpus), labels_of(corpus, "test")])
    assert found.dtype == torch.float32 and sorted(found.tolist()) == pytest.approx([*values, 5.0])


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.parquet"])
def test_lists_are_sets_of_classes_and_an_empty_one_is_a_label(tmp_path, tokenizer, name):
    sets = [["b", "a"], [], ["c"]]
    rows = [{"text": text, "label": sets[i % 3]} for i, text in enumerate(texts(60))]
    given = [{**row, "label": json.dumps(row["label"])} for row in rows] if name.endswith("csv") else rows
    corpus = corpus_of(tmp_path, tokenizer, given, name, labelled=20)
    assert (corpus.head, corpus.classes, corpus.settled.about) == ("multi_label", ("a", "b", "c"), "sets of 3 classes")
    seen = {tuple(row) for row in labels_of(corpus).tolist()}
    assert seen == {(1, 1, 0), (0, 0, 0), (0, 0, 1), (-100, -100, -100)}
    assert int((labels_of(corpus)[:, 0] != -100).sum()) == 20 == len(corpus.labelled)


def test_hidden_numbers_stay_out_of_the_labels_and_sets_are_equal_in_any_order(tmp_path, tokenizer):
    rows = [{"text": text, "label": i / 7} for i, text in enumerate(texts(60))]
    found = labels_of(corpus_of(tmp_path, tokenizer, rows, labelled=10))
    assert int((found != -100).sum()) == 10 < len(found)
    rows = [{"text": text, "label": label} for text in texts(30) for label in (["a", "b"], ["b", "a"])]
    rows += [{"text": "fish fish fish", "label": []}]
    corpus = corpus_of(tmp_path, tokenizer, rows)
    assert len(corpus.train) + len(corpus.test) == 31  # equal rows, no contradictions
    with pytest.raises(InputError, match="texts stand there with different labels"):
        corpus_of(tmp_path, tokenizer, [*rows, {"text": "fish fish fish", "label": ["a"]}])


def test_a_pair_is_two_texts_in_one_example_and_part_of_what_tells_rows_apart(tmp_path, tokenizer):
    rows = [{"text": text, "b": b, "label": b} for text in texts(30) for b in ("cat", "dog")]
    corpus = corpus_of(tmp_path, tokenizer, rows, columns={"pair": "b"})
    assert len(corpus.train) + len(corpus.test) == 60
    both = {tuple(tokenizer(row["text"], row["b"])["input_ids"]) for row in rows}
    assert {tuple(corpus.train[number].tolist()) for number in range(len(corpus.train))} < both


@pytest.mark.parametrize(
    ("labels", "head"),
    [
        ([1.5, 2], "regression"),
        (["1.5", "2"], "regression"),
        (["-1e-3", "+2.", ".5"], "regression"),
        (["1", "2", "many"], "sequence"),
        (["v1.5", "1.5.2"], "sequence"),
        (["1_0.5", "5"], "sequence"),
        ([True, False], "sequence"),
        ([[], ["a"]], "multi_label"),
    ],
)
def test_the_kind_follows_from_how_labels_are_written(labels, head):
    assert head_of([read_label(label) for label in labels], stated=False) == head


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["1.5", "n/a"], r"decimal numbers as text \(e.g. '1.5'\) and text \(e.g. 'n/a'\)"),
        ([1, "1"], "several kinds"),
        ([["a"], "a"], "lists .* and text"),
        ([True, "yes"], "true or false"),
        ([1.5, "1.5"], "several kinds"),
    ],
)
def test_labels_of_several_kinds_are_refused_with_examples(labels, words):
    with pytest.raises(InputError, match=words):
        head_of(labels, stated=False)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (["a", "a"], "names a class twice"),
        (["a", 1], "no list of classes"),
        (["a", " "], "has a class without a name"),
        ([["a"]], "no list of classes"),
        ({"a": 1}, "is no label"),
        (float("nan"), "no finite number"),
        (float("inf"), "no finite number"),
    ],
)
def test_what_is_no_label_is_refused(label, words):
    with pytest.raises(ValueError, match=words):
        read_label(label)


def test_the_file_and_the_line_of_a_wrong_label_are_named(tmp_path, tokenizer):
    rows = [{"text": text, "label": ["a"]} for text in texts(20)]
    rows[7]["label"] = ["a", "a"]
    with pytest.raises(InputError, match=r"data\.jsonl, line 8: column 'label' names a class twice"):
        corpus_of(tmp_path, tokenizer, rows)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (lambda i: 4.5, "every label is 4.5"),
        (lambda i: -100.0 if i == 3 else i / 7, "-100 stands for rows without a label"),
        (lambda i: 1000 + i, "these are no classes"),
        (lambda i: "one", "two or more classes"),
        (lambda i: [1, 0] if i % 2 else [0, 1], "every row has 0, 1; a list is of classes, not a 0 or 1 for each"),
        (lambda i: [], r"two or more classes, found \[\]"),
    ],
)
def test_labels_that_nobody_can_learn_are_refused(tmp_path, tokenizer, label, words):
    with pytest.raises(InputError, match=words):
        corpus_of(tmp_path, tokenizer, [{"text": text, "label": label(i)} for i, text in enumerate(texts(60))])


def test_the_recipe_makes_classes_of_numbers_and_decides_on_their_order(tmp_path, tokenizer):
    rows = [{"text": text, "label": f"{i % 3}.0"} for i, text in enumerate(texts(60))]
    corpus = corpus_of(tmp_path, tokenizer, rows, classes=["2.0", "0.0", "1.0", "9.0"])
    assert corpus.head == "sequence" and corpus.classes == ("2.0", "0.0", "1.0", "9.0")
    assert corpus.summary["test"]["classes"]["9.0"] == 0
    assert any("no train example of the class '9.0'" in line for line in describe(corpus.summary))
    with pytest.raises(InputError, match=r"the data have 2\.0, which the list does not; it has 0\.0, 1\.0"):
        corpus_of(tmp_path, tokenizer, rows, classes=["0.0", "1.0"])


def test_numbers_of_classes_get_the_names_that_the_recipe_lists(tmp_path, tokenizer):
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(texts(60))]
    named = corpus_of(tmp_path, tokenizer, rows, classes=["bad", "fair", "good"])
    assert named.classes == ("bad", "fair", "good")
    assert sum(named.summary[split]["classes"]["bad"] for split in ("train", "test")) == 20
    plain = corpus_of(tmp_path, tokenizer, [{**row, "label": i % 12} for i, row in enumerate(rows)])
    assert plain.classes == tuple(map(str, range(12)))  # 2 before 10
    lacking = [{**row, "label": None if i % 7 == 3 else float(row["label"])} for i, row in enumerate(rows)]  # as pandas
    with_point = corpus_of(tmp_path, tokenizer, lacking, classes=["bad", "fair", "good"])
    found = {name: sum(own["classes"][name] for own in with_point.summary.values()) for name in with_point.classes}
    assert found == Counter(named.classes[int(row["label"])] for row in lacking if row["label"] is not None)
    counted = [{**row, "label": 1 + row["label"]} for row in rows]
    with pytest.raises(InputError, match=r"the data have 1, 2, 3, .*it has bad, fair, good; numbers count from 0"):
        corpus_of(tmp_path, tokenizer, counted, classes=["bad", "fair", "good"])
    # Neither names nor numbers: 0 would be "1" by number and nothing by name.
    with pytest.raises(InputError, match="the data have 0, 2, which the list does not"):
        corpus_of(tmp_path, tokenizer, rows, classes=["1", "good", "x"])


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (("a|b", "b", "a|c"), """3 classes; 'a|b' may be several in one: sets are lists, as in ["a", "b"]"""),
        (("1,17", "17", "1"), "3 classes; '1,17' may be several in one"),
        (("-1", "0", "1"), "3 classes; '-1' is a class too: where there is none, leave it empty"),
        (("e", "n", "-"), "3 classes; '-' is a class too"),
        (("crane, bird", "crane, machine", "bird's nest"), "3 classes"),
        (("👍", "א", "C++"), "3 classes"),
    ],
)
def test_classes_that_may_be_several_or_none_are_said(tmp_path, tokenizer, classes, words):
    corpus = corpus_of(
        tmp_path, tokenizer, [{"text": text, "label": classes[i % 3]} for i, text in enumerate(texts(60))]
    )
    assert corpus.settled.about == words or (";" in words and corpus.settled.about.startswith(words))


def test_a_class_that_one_labelled_example_has_is_said_and_hidden_labels_do_not_count(tmp_path, tokenizer):
    rows = [{"text": text, "label": "rare" if i < 3 else "ab"[i % 2]} for i, text in enumerate(texts(60))]
    corpus = corpus_of(tmp_path, tokenizer, rows, labelled=8)
    assert sum(corpus.summary["train"]["classes"].values()) == 8
    lines = "\n".join(describe(corpus.summary))
    for number, words in ((0, "no"), (1, "only one")):
        for split in ("train", "test"):
            named = corpus.summary[split]["classes"]["rare"] == number
            assert (f"{words} {split} example of the class 'rare'" in lines) == named


TRAINED = "teacher: {model: ./teacher}\n"


def session_of(folder, labels, *overrides, **config):
    """A project whose teacher is trained (as its config says), with these labels in turn."""
    path = tiny_project(folder)
    rows = [{"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(texts(90))]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = tiny_config("bert", pad_token_id=0, **config)
    AutoModelForSequenceClassification.from_config(own).save_pretrained(folder / "teacher")
    lines = []
    recipe = load_recipe(path, ["teacher.init=pretrained", "teacher.fit=null", "data.labelled=null", *overrides])
    return Session(recipe, folder, RunDir(folder / "run"), lines.append), lines


def classes_of(*arguments, **config):
    session, lines = session_of(*arguments, **config)
    run_stages(session, [stage.STAGE])
    return session, "\n".join(lines)


def test_outputs_without_names_take_numbers_in_their_order_and_other_classes_only_as_listed(tmp_path):
    session, said = classes_of(_made(tmp_path / "numbers"), [0, 1, 2], num_labels=3)
    assert session.corpus.classes == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert "labels: 3 classes, whole numbers, taken for the numbers of the teacher's outputs" in said
    assert sum(own["classes"]["LABEL_2"] for own in session.corpus.summary.values()) == 30
    names = ["bad", "fair", "good"]
    with pytest.raises(InputError, match=r"knows LABEL_0, .*no names.*data\.classes: \[bad, fair, good\].*add `fit`"):
        classes_of(_made(tmp_path / "refused"), names, num_labels=3)
    stated = "data.classes=[good, bad, fair]"
    session, said = classes_of(_made(tmp_path / "stated"), names, stated, num_labels=3)
    assert session.corpus.classes == ("good", "bad", "fair")
    assert "good, bad, fair, which the teacher calls LABEL_0, LABEL_1, LABEL_2" in said
    assert session.head.labels == ("good", "bad", "fair")


def test_a_list_of_classes_is_offered_in_the_order_of_the_teacher_and_only_where_it_could_help(tmp_path):
    named = {"id2label": {0: "POS", 1: "NEG", 2: "other"}}
    with pytest.raises(InputError, match=r"rename them; or write .*data\.classes: \[pos, neg, …\]; or add `fit`"):
        classes_of(_made(tmp_path / "case"), ["neg", "pos"], **named)
    with pytest.raises(
        InputError, match="has the classes mixed, the teacher knows NEG, POS: rename them; or add `fit`"
    ):
        classes_of(_made(tmp_path / "more"), ["NEG", "POS", "mixed"], id2label={0: "NEG", 1: "POS"})


def test_whole_numbers_are_values_for_a_teacher_that_gives_one(tmp_path):
    session, said = classes_of(_made(tmp_path / "values"), [1, 2, 5], num_labels=1, problem_type="regression")
    assert session.corpus.head == "regression" and session.corpus.classes == ()
    assert "labels: 3 classes, all whole numbers: values, as the teacher gives one" in said
    labels = collate(session.corpus, session.corpus.test, range(len(session.corpus.test)))["labels"]
    assert labels.dtype == torch.float32 and set(labels.tolist()) == {1, 2, 5}


def test_labels_that_are_lost_with_their_rows_are_counted_in_the_refusal(tmp_path, tokenizer):
    rows = [{"text": text if i % 2 else " ", "label": "ab"[i % 2]} for i, text in enumerate(texts(60))]
    with pytest.raises(InputError, match=r"two or more classes, found \['b'\] \(train: .* 60 read, 30 empty; test: "):
        corpus_of(tmp_path, tokenizer, rows)


def test_a_teacher_whose_files_number_the_classes_in_two_ways_is_refused(tmp_path):
    numbered = {"id2label": {0: "x", 1: "y"}, "label2id": {"x": 1, "y": 0}}
    with pytest.raises(InputError, match="id2label and label2id do not number the classes alike"):
        classes_of(_made(tmp_path / "two"), ["x", "y"], **numbered)
    stale = {"id2label": {0: "x", 1: "y"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    assert classes_of(_made(tmp_path / "stale"), ["x", "y"], **stale)[0].corpus.classes == ("x", "y")


def test_whole_numbers_with_a_point_are_said_to_be_whole(tmp_path, tokenizer):
    rows = [{"text": text, "label": float(i % 2)} for i, text in enumerate(texts(60))]
    assert "all whole (data.classes would make classes of them)" in corpus_of(tmp_path, tokenizer, rows).settled.about


def test_a_stated_order_must_be_that_of_the_teacher_and_as_long(tmp_path):
    named = {"id2label": {0: "x", 1: "y"}}
    with pytest.raises(InputError, match="the teacher has its classes in another order, x, y"):
        classes_of(_made(tmp_path / "other"), ["x", "y"], "data.classes=[y, x]", **named)
    with pytest.raises(InputError, match="lists 3 classes, and the teacher has 2 outputs"):
        classes_of(_made(tmp_path / "more"), ["x", "y"], "data.classes=[x, y, z]", **named)
    session, said = classes_of(_made(tmp_path / "fewer"), ["y", "x"], id2label={0: "z", 1: "y", 2: "x"})
    assert session.corpus.classes == ("z", "y", "x") and "2 classes, of the 3 that the teacher knows" in said


@pytest.mark.parametrize(
    ("labels", "config", "words"),
    [
        ([0.5, 1.5], {"num_labels": 3}, "numbers from 0.5 to 1.5.*says 3 outputs"),
        (["a", "b"], {"num_labels": 1}, "2 classes.*says 1 outputs"),
        (["a", "b"], {"problem_type": "multi_label_classification"}, "problem_type multi_label_classification"),
        ([["a"], ["b"]], {"problem_type": "single_label_classification"}, "sets of 2 classes.*single_label"),
        ([["a"], ["b"]], {"num_labels": 1, "problem_type": "regression"}, "problem_type regression"),
    ],
)
def test_a_teacher_that_was_trained_for_labels_of_another_kind_is_refused(tmp_path, labels, config, words):
    with pytest.raises(InputError, match=words):
        classes_of(tmp_path, labels, **config)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), r"losses\.1: a regression head has one number, not a distribution; write `loss: logit_mse`"),
        (
            ("evaluation.metrics=[mse, accuracy]",),
            r"evaluation\.metrics: metric 'accuracy' .*pearson, spearman, mse",
        ),
        (("evaluation.metrics=[kl]",), r"evaluation\.metrics: metric 'kl' needs"),
        (
            ("training.keep_best=f1_macro",),
            r"training\.keep_best: f1_macro is not .* use pearson, spearman, mse",
        ),
        (("student.mlp.score=taylor",), r"student\.mlp\.score: the labels are numbers"),
    ],
)
def test_what_numbers_do_not_have_is_refused_once_the_data_are_read(tmp_path, overrides, words):
    numbers = "losses.1.loss=logit_mse" if overrides else "seed=3"
    session, _ = session_of(tmp_path, [0.5, 1.5, 4.0], numbers, *overrides, num_labels=1)
    with pytest.raises(InputError, match=words):
        run_stages(session, [stage.STAGE], [stage.STAGE, calibrate.STAGE, train.STAGE, evaluate.STAGE])
    assert not (tmp_path / "run/calibration.safetensors").exists()


def test_what_sets_and_classes_have_is_accepted(tmp_path):
    story = [stage.STAGE, calibrate.STAGE, train.STAGE, evaluate.STAGE]
    cases = (("sets", [["a"], ["a", "b"]], "f1_micro", 2), ("classes", ["a", "b"], "matthews", 2))
    for name, labels, metric, outputs in cases:
        wanted = (f"training.keep_best={metric}", f"evaluation.metrics=[{metric}, kl]", "data.classes=[a, b]")
        session, _ = session_of(_made(tmp_path / name), labels, *wanted, num_labels=outputs)
        run_stages(session, [stage.STAGE], story)
        found = train.measure_held_out(session, random_model(session.source, session.head, 0), lambda: False)
        assert metric in found and "kl" not in found


def test_a_model_of_each_kind_says_so_in_its_config(tmp_path):
    task = TASKS["classification"]()
    for labels, kind, outputs in (
        ([0.5, 1.5], "regression", 1),
        ([["a"], ["b"], ["c"]], "multi_label_classification", 3),
        (["a", "b"], "single_label_classification", 2),
    ):
        counts = {"train": Counter({json.dumps(label): 30 for label in labels})}
        spec = Data(source="./x.jsonl", task="classification")
        settled = task.settle(counts, spec)
        head = ModelHead(task.auto_class, settled.classes, 0, task.model_settings(settled))
        folder = _made(tmp_path / kind)
        tiny_config("bert").save_pretrained(folder)
        config = load_config(folder, head)
        assert (config.problem_type, config.num_labels) == (kind, outputs)
        assert random_model(folder, head, 0).classifier.out_features == outputs


def _made(folder):
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox"])
def test_a_decoder_whose_tokenizer_has_no_padding_reads_the_last_token_of_each_row(tmp_path, family):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<u>", "<e>", *WORDS])}, unk_token="<u>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<u>", eos_token="<e>", model_max_length=64)
    plain.save_pretrained(tmp_path / "teacher")
    torch.manual_seed(0)
    config = tiny_config(family, pad_token_id=None, eos_token_id=1, bos_token_id=1, num_labels=2)
    config.save_pretrained(tmp_path / "teacher")
    tokenizer = load_tokenizer(tmp_path / "teacher")
    assert tokenizer.pad_token == "<e>"
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts(60))]
    rows += [{"text": f"cat <e> {'dog ' * (i % 3)}<e>" + " <e>" * (i % 2), "label": "a"} for i in range(3)]
    rows += [{"text": "fish " * 9, "label": "b"}]
    corpus = corpus_of(tmp_path, tokenizer, rows)
    model = random_model(tmp_path / "teacher", ModelHead("AutoModelForSequenceClassification", ("a", "b"), 1), 0)
    assert model.config.pad_token_id == corpus.padding == 1
    examples = range(len(corpus.train))
    together = forward(model, collate(corpus, corpus.train, examples), Capture()).logits
    alone = [forward(model, collate(corpus, corpus.train, [i]), Capture()).logits[0] for i in examples]
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)
    stock = [model(input_ids=torch.tensor(corpus.train[i])[None].long()).logits[0] for i in examples]
    assert torch.allclose(together, torch.stack(stock), atol=1e-5)
    assert len({len(corpus.train[i]) for i in examples}) > 1


def test_a_config_that_names_a_padding_gives_it_to_a_tokenizer_that_has_none(tmp_path):
    tiny_project(tmp_path, family="llama")
    settings = tmp_path / "teacher/tokenizer_config.json"
    known = json.loads(settings.read_text())
    known.pop("pad_token")
    settings.write_text(json.dumps(known))
    tiny_config("llama", pad_token_id=2).save_pretrained(tmp_path / "teacher")
    assert load_tokenizer(tmp_path / "teacher").pad_token_id == 2


def test_a_decoder_and_a_tokenizer_that_pad_differently_are_refused(tmp_path):
    for family, refused in (("llama", True), ("bert", False)):
        folder = _made(tmp_path / family)
        tiny_project(folder, family=family)
        tiny_config(family, pad_token_id=2).save_pretrained(folder / "teacher")
        session = Session(load_recipe(folder / "recipe.yaml"), folder, RunDir(folder / "run"), lambda _line: None)
        if refused:
            with pytest.raises(InputError, match=r"pads with '\[PAD\]', id 0, and config.json says pad_token_id 2"):
                run_stages(session, [stage.STAGE])
        else:
            run_stages(session, [stage.STAGE])


def test_a_chinese_text_is_read_character_by_character_and_cut(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = "很好坏书电影不错差"
    known = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(["[P]", "[U]", *signs])}, unk_token="[U]"))
    known.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=known, pad_token="[P]", unk_token="[U]", eos_token="[U]", model_max_length=64
    )
    rows = [{"text": (signs * 3)[i % 9 : i % 9 + 3 + i % 17], "label": "好坏"[i % 2]} for i in range(100)]
    rows = list({row["text"]: row for row in rows}.values())
    corpus = corpus_of(tmp_path, tokenizer, rows)
    assert corpus.classes == ("坏", "好") and corpus.summary["train"]["unknown_share"] == 0
    longest = max(len(row["text"]) for row in rows)
    assert longest > 16 and corpus.train.lengths.max() == 16 and corpus.summary["train"]["truncated"] > 0
    assert np.isin(corpus.train.lengths, range(3, 17)).all()


def test_a_teacher_of_ours_is_loaded_with_its_own_head(tmp_path):
    model = tiny_model("bert", num_labels=1)
    model.save_pretrained(tmp_path)
    head = ModelHead("AutoModelForSequenceClassification", (), 0, {"problem_type": "regression", "num_labels": 1})
    assert load_model(tmp_path, head).config.problem_type == "regression"

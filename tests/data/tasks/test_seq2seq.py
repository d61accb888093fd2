"""The task `seq2seq`: what is encoded, written and measured, and from data to release through the command line."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch
from tiny import tiny_config, tiny_model
from two_stacks import CHINESE, LETTERS, symbols_tokenizer, text_project, write_project

from distill.cli import main
from distill.data.prepare import prepare
from distill.data.rows import Order
from distill.data.tasks.seq2seq import Seq2Seq
from distill.data.tasks.task import Encoder, Ragged, Settled
from distill.errors import InputError
from distill.models.generate import write_greedily
from distill.recipe.data import Data


def bound(folder, tokenizer, **settings):
    """The task and an encoder for it, beside a T5 whose decoder starts with padding."""
    tiny_config("t5").save_pretrained(folder)
    spec = Data(source="./x.jsonl", task="seq2seq", **settings)
    return Seq2Seq().bind(folder, tokenizer, spec), Encoder(tokenizer, spec, Settled("seq2seq"))


def test_both_texts_are_cut_at_their_own_length_and_counted(tmp_path):
    tokenizer = symbols_tokenizer(LETTERS)
    task, encoder = bound(tmp_path, tokenizer, max_length=4, max_target_length=3, prefix="h ")
    rows = {"source": ["a b", "a b c d", "a"], "target": ["b c", "b c d", None]}
    found = task.encode(rows, encoder)
    a, end = tokenizer.convert_tokens_to_ids(["a", "</s>"])
    assert found["input_ids"] == [[a + 7, a, a + 1, end], [a + 7, a, a + 1, end]]
    assert found["target_ids"] == [[a + 1, a + 2, end], [a + 1, a + 2, end]]
    assert (found["target_text"], found["row"]) == (["b c", "b c d"], [0, 1])
    assert encoder.truncated == 1
    assert dict(encoder.notes) == {"rows left out that have no target": 1, "targets cut to 3 tokens": 1}


def test_sources_that_begin_with_the_prefix_are_counted(tmp_path):
    task, encoder = bound(tmp_path, symbols_tokenizer(LETTERS), prefix="h ")
    task.encode({"source": ["h a b", "a b"], "target": ["b", "c"]}, encoder)
    assert encoder.notes == {"texts that begin with 'h' before it is put in front of them": 1}


def test_a_target_ends_and_does_not_start_with_the_token_that_is_put_in_front(tmp_path):
    tokenizer = symbols_tokenizer(LETTERS, writes="$A")
    task, encoder = bound(tmp_path, tokenizer, max_length=4)
    a, end = tokenizer.convert_tokens_to_ids(["a", "</s>"])
    found = task.encode({"source": ["a"] * 3, "target": ["<pad> a b", "a b c d", "a"]}, encoder)
    assert found["target_ids"] == [[a, a + 1, end], [a, a + 1, a + 2, end], [a, end]]
    assert encoder.notes == {"targets given the end token that the tokenizer does not write": 3}


def test_labels_are_padded_with_no_label(tmp_path):
    task, _ = bound(tmp_path, symbols_tokenizer(LETTERS))
    lists = Ragged(torch.tensor([5, 1, 6, 7, 1]).numpy(), torch.tensor([2, 3]).numpy())
    batch = task.collate({"input_ids": lists, "target_ids": lists}, 0, [])
    assert batch["labels"].tolist() == [[5, 1, -100], [6, 7, 1]]
    assert batch["input_ids"].tolist() == [[5, 1, 0], [6, 7, 1]]


def test_the_language_of_the_target_is_the_first_token_that_is_written(tmp_path):
    batch = {"input_ids": torch.tensor([[5, 6, 1]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    for writes, forced in (("$A </s> h", False), ("h $A </s>", True)):
        tokenizer = symbols_tokenizer(LETTERS, writes=writes)
        tokenizer.tgt_lang = "h"
        task, _ = bound(tmp_path, tokenizer)
        assert task.settings == ({"forced_bos_token_id": 10} if forced else {})
    assert write_greedily(tiny_model("t5"), batch, 4, **task.settings)[0, :2].tolist() == [0, 10]


def test_a_model_without_decoder_is_refused(tmp_path):
    tiny_config("bert").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is of no encoder-decoder"):
        Seq2Seq().bind(tmp_path, symbols_tokenizer(LETTERS), Data(source="./x.jsonl", task="seq2seq"))


LOOKS = "training={keep_best: rouge_l, evaluate_every: 5, steps: 9}"
REFUSED = {
    "a decoder": ("llama", [], "teacher.model", "llama has one stack of layers"),
    "sound": ("whisper", [], "teacher.model", "whisper reads sound, and task: seq2seq does not"),
    "positions": ("bart", ["data.max_target_length=65"], "data.max_target_length", "the teacher has 64 positions"),
    "labels hidden": ("t5", ["data.labelled=9"], "data.labelled", "has no effect with task: seq2seq"),
    "written texts": ("t5", [LOOKS], "training.keep_best", "use perplexity, token_accuracy"),
    "other metric": ("t5", ["evaluation.metrics=[accuracy]"], "evaluation.metrics.0", "rouge_1, rouge_2, wer, cer"),
    "repair": ("t5", ["student.repair.refit=true"], "student.repair", "whose layers cannot be repaired yet"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_task_cannot_have_is_refused_before_the_first_stage(tmp_path, capsys, name):
    family, changes, key, words = REFUSED[name]
    recipe = text_project(tmp_path, family)
    assert main(["run", str(recipe), "--out", str(tmp_path / "run"), *changes]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert key in said and words in said and "started" not in said


def test_several_targets_of_one_source_are_refused_or_kept(tmp_path):
    symbols_tokenizer(LETTERS).save_pretrained(tmp_path)
    rows = [{"source": "a", "target": target} for target in ("b", "c", "b")]
    rows += [{"source": " ".join(pair), "target": "b"} for pair in itertools.product(LETTERS, LETTERS)]
    write_project(tmp_path, rows, "")

    def prepared(rule):
        spec = Data(source="./data.jsonl", task="seq2seq", max_length=8, contradictions=rule)
        task, encoder = bound(tmp_path, symbols_tokenizer(LETTERS), max_length=8)
        folder = tmp_path / rule
        folder.mkdir()
        return prepare(Order(task, spec, encoder.tokenizer, 0, tmp_path), folder)

    with pytest.raises(InputError, match="first, majority, drop or keep"):
        prepared("refuse")
    kept = prepared("keep")
    texts = [text for own in kept.splits.values() for text in own.take(range(len(own)))["target_text"]]
    assert sorted(texts) == ["b"] * 65 + ["c"]
    assert kept.summary["train"]["rows"]["equal"] == 1
    assert len(prepared("majority").train) + len(kept.test) == len(kept.train) + len(kept.test) - ("c" in texts)


def test_rows_of_a_file_without_a_target_are_counted(tmp_path):
    symbols_tokenizer(LETTERS).save_pretrained(tmp_path)
    rows = [{"source": " ".join(pair), "target": "b"} for pair in itertools.product(LETTERS, LETTERS)]
    for row in rows:
        if row["source"].startswith(("a", "c")):
            row["target"] = None if row["source"].startswith("a") else " "
    write_project(tmp_path, rows, "")
    spec = Data(source="./data.jsonl", task="seq2seq", max_length=8)
    task, encoder = bound(tmp_path, symbols_tokenizer(LETTERS), max_length=8)
    (tmp_path / "made").mkdir()
    made = prepare(Order(task, spec, encoder.tokenizer, 0, tmp_path), tmp_path / "made")
    assert len(made.train) + len(made.test) == 48
    train, test = made.summary["train"], made.summary["test"]
    assert train["notes"]["rows left out that have no target"] + test["rows"]["unlabelled"] == 16


CLASSES = {"bart": {"forced_eos_token_id": 1}, "t5": {}}


@pytest.mark.slow
@pytest.mark.parametrize("family", CLASSES)
def test_an_encoder_decoder_with_a_head_of_classes_is_cut_timed_and_released(tmp_path, family):
    recipe = text_project(tmp_path, family, **CLASSES[family])
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    labelled = [{"text": row["source"], "label": "yes" if "a" in row["source"] else "no"} for row in rows]
    own = recipe.read_text().replace("task: seq2seq", "task: classification").replace("steps: 140", "steps: 20")
    write_project(tmp_path, labelled, own.replace("efficiency: false", "efficiency: true"))
    assert main(["run", str(recipe), "--out", str(tmp_path / "run")]) == 0
    table = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert {arm["name"] for arm in table["arms"]} == {"teacher", "cut", "distilled"}
    assert table["efficiency"]["protocol"]["length"] == 12
    assert 0.3 < table["efficiency"]["ratios"]["student"]["layer_parameters"] < 0.5  # both stacks
    assert (tmp_path / "run/release/model.safetensors").is_file()


ONE_LINE = """
import sys
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
folder, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSeq2SeqLM.from_pretrained(folder)
print(tokenizer.decode(model.generate(**tokenizer(text, return_tensors="pt"))[0], skip_special_tokens=True))
assert "distill" not in sys.modules
"""
FAMILIES = {
    "t5": ("t5", LETTERS, " ", {"dropout_rate": 0.0}),
    "bart": ("bart", CHINESE, "", {"dropout": 0.0, "init_std": 0.1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_is_cut_distilled_and_released(tmp_path, name):
    family, symbols, between, settings = FAMILIES[name]
    recipe, run = text_project(tmp_path, family, symbols, between, **settings), tmp_path / "run"
    assert main(["run", str(recipe), "--out", str(run)]) == 0
    table = json.loads((run / "evaluation.json").read_text())
    arms = {arm["name"]: arm["metrics"] for arm in table["arms"]}
    assert arms["teacher"]["token_accuracy"] > 0.5
    assert arms["distilled"]["kl"] < 0.5 * arms["cut"]["kl"]
    assert arms["distilled"]["perplexity"] < arms["cut"]["perplexity"]
    assert arms["distilled"]["chrf"] > arms["cut"]["chrf"]
    texts = json.loads((run / "predictions/distilled.json").read_text())
    assert set("".join(texts["generated"])) <= {*symbols, *between}
    plan = json.loads((run / "plan.json").read_text())
    assert (len(plan["layers"]), len(plan["encoder_layers"])) == (2, 2)
    command = [sys.executable, "-I", "-c", ONE_LINE, run / "release", between.join(symbols[:3])]
    used = subprocess.run(command, capture_output=True, text=True, check=False)
    assert used.returncode == 0, used.stderr
    assert {*used.stdout.strip()} <= {*symbols, *between}

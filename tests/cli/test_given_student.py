"""A student that is given, through the command line: to a gated release, in a second round, and what is refused."""

from __future__ import annotations

import json
import shutil

import embeddings
import huggingface_hub
import pytest
import two_stacks
from given import FITTED, GIVEN, GPT2, TINY, small
from tiny import RECIPE, tiny_project
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from distill.cli import main
from distill.models.load import load_student

pytestmark = pytest.mark.slow

CAUSAL = GIVEN.replace("task: classification, labelled: 24,", "task: causal_lm,").replace("steps: 12,", "steps: 40,", 1)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished run that cut layers 1 and 3 from its teacher, which it fitted."""
    folder = tmp_path_factory.mktemp("first")
    recipe = tiny_project(folder, RECIPE)
    assert main(["run", str(recipe), "evaluation.efficiency=false", "--out", str(folder / "run")]) == 0
    return folder


def copied(first, folder, recipe):
    """A project whose teacher is the fitted one of an earlier run."""
    shutil.copytree(first / "run" / "teacher", folder / "teacher")
    shutil.copy(first / "data.jsonl", folder)
    (folder / "recipe.yaml").write_text(recipe)
    return folder / "recipe.yaml"


def test_a_narrower_model_of_another_family_is_trained_to_a_release(tmp_path, capsys):
    recipe = tiny_project(tmp_path, GIVEN)
    small(tmp_path, **TINY)
    given = [f"student.from={tmp_path / 'small'}", "evaluation.arms=[teacher, cut, distilled]"]
    assert main(["run", str(recipe), *given, "--out", str(tmp_path / "run")]) == 0
    said, run = capsys.readouterr().err.replace(str(tmp_path / "small"), "./small"), tmp_path / "run"
    assert "student.from: ./small is a distilbert of 2 layers, 16 wide, the teacher's 32" in said
    assert "paired with layers 1, 3 of the teacher by an even rule, as nothing was cut" in said
    assert "drawn at random, to be fitted: classifier.bias, classifier.weight, pre_classifier.bias and 1 more" in said
    assert "calibrate: started" not in said and not (run / "calibration.safetensors").exists()
    plan = json.loads((run / "plan.json").read_text())
    assert plan["given"] == {"model_type": "distilbert", "hidden_size": 16, "teacher_hidden_size": 32, "map": "rule"}
    assert [layer["teacher_layer"] for layer in plan["layers"]] == [1, 3]
    released = load_student(run / "release")
    assert released.config.model_type == "distilbert" and released.config.num_labels == 3
    table = json.loads((run / "evaluation.json").read_text())
    titles = {arm["name"]: arm["title"] for arm in table["arms"]}
    assert titles["cut"] == "cut (nothing was cut: the student as given, before training)"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(record["terms"]["hidden.mse"] > 0 for record in records if record["event"] == "train")
    card = (run / "release" / "README.md").read_text()
    origin = "was not cut from its teacher: it starts from ./small, a distilbert of 2 layers, and is taught by a bert"
    for text in (card, (run / "report.html").read_text()):
        assert origin in text and "Where the student comes from" in text and "What was cut" not in text
        assert "learned maps between them are not released" in text and str(tmp_path) not in text
    assert main(["validate", str(run / "release" / "recipe.yaml")]) == 0
    assert "from: ./small" in card and "| 1 | 3 | 24 |" in card


def test_a_second_round_starts_from_a_release_and_its_layers_are_those_of_the_first_plan(first, tmp_path, capsys):
    recipe = copied(first, tmp_path, FITTED)
    given = [f"student.from={first / 'run' / 'release'}", "evaluation.efficiency=false"]
    assert main(["run", str(recipe), *given, "--out", str(tmp_path / "run")]) == 0
    assert "paired with layers 1, 3 of the teacher as its plan.json says" in capsys.readouterr().err
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["given"]["map"] == "plan" and [layer["teacher_layer"] for layer in plan["layers"]] == [1, 3]
    before = {arm["name"]: arm["metrics"] for arm in json.loads((first / "run/evaluation.json").read_text())["arms"]}
    after = {arm["name"]: arm["metrics"] for arm in json.loads((tmp_path / "run/evaluation.json").read_text())["arms"]}
    assert after["cut"] == before["distilled"]  # it goes on from where the first round ended
    assert "An earlier run cut it from this teacher" in (tmp_path / "run/release/README.md").read_text()


def test_maps_of_two_rounds_compose_where_the_rule_would_pair_other_layers(first, tmp_path, capsys):
    plan = json.loads((first / "run" / "release" / "plan.json").read_text())
    shutil.copytree(first / "run" / "release", tmp_path / "small")
    plan["layers"][0]["teacher_layer"] = 0
    (tmp_path / "small" / "plan.json").write_text(json.dumps(plan))
    recipe = copied(first, tmp_path, FITTED)
    assert main(["plan", str(recipe), "--out", str(tmp_path / "run")]) == 0
    assert "paired with layers 0, 3 of the teacher as its plan.json says" in capsys.readouterr().err
    plan["teacher_layers"] = 5  # of another teacher
    (tmp_path / "small" / "plan.json").write_text(json.dumps(plan))
    assert main(["plan", str(recipe), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert "plan: runs again (student" in said
    assert "paired with layers 1, 3 of the teacher by an even rule" in said


def test_a_release_with_a_width_of_its_own_in_each_layer_is_given(first, tmp_path, capsys):
    widths = "{keep: [8, 16], multiple_of: 8}"
    recipe = tiny_project(tmp_path, RECIPE.replace("{keep: 0.5, multiple_of: 8}", widths))
    overrides = ["evaluation.efficiency=false", "release.format=native", "training.steps=4"]
    assert main(["run", str(recipe), *overrides, "--out", str(tmp_path / "one")]) == 0
    given = FITTED.replace("./teacher", "./one/teacher").replace("./small", "./one/release")
    (tmp_path / "second.yaml").write_text(given)
    assert main(["run", str(tmp_path / "second.yaml"), "--out", str(tmp_path / "two")]) == 2
    assert "release.format: the student's layers have MLPs of different widths" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "second.yaml"), *overrides[:2], "--out", str(tmp_path / "two")]) == 0
    plan = json.loads((tmp_path / "two" / "plan.json").read_text())
    assert [layer["kept"]["mlp"]["of"] for layer in plan["layers"]] == [8, 16]


def test_a_language_model_with_more_rows_in_its_head_is_taught_by_one_with_fewer(tmp_path, capsys):
    recipe = tiny_project(tmp_path, CAUSAL, "llama")
    small(tmp_path, "gpt2", AutoModelForCausalLM, **GPT2)
    assert main(["run", str(recipe), "evaluation.efficiency=false", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert "student.from: 72 rows of embeddings, the teacher has 64; the first" in said
    assert load_student(tmp_path / "run" / "release").config.vocab_size == 72


REFUSED = {
    "student.layers={keep: 2}": "student.layers: has no effect: `from` names a student, and nothing is cut",
    "student.mlp.keep=0.5": "student.mlp.keep: has no effect: `from` names a student",
    "student.mlp.multiple_of=8": "student.mlp.multiple_of: has no effect: `from` names a student",
    "student.repair.bias=true": "student.repair: has no effect: `from` names a student",
    "student.calibration.examples=8": "student.calibration: has no effect: `from` names a student",
    "student.target.parameters=0.5": "student.target: has no effect: `from` names a student",
    "student.encoder_layers={keep: 1}": "student.encoder_layers: has no effect: `from` names a student",
    "student.revision=main": "student.revision: has no effect: only hub ids have revisions",
    "student.from=./nowhere": "student.from: ./nowhere: there is no folder",
    "student.from=small": "write ./small for the folder",
    "student.from=null": "student.layers: missing, and from is not given either",
    "student.sha256=" + "a" * 64: "student.sha256: the weights of ./small have",
    "data.max_length=64": "student.from: 64 tokens per example, it has 20 positions",
    "losses.2.map=[[2, 0]]": "map: pair [2, 0] names student layer 2, but the student has 2 layers",
    "training.freeze=[nosuch*]": "training.freeze.0: 'nosuch*' matches no parameter of the given student",
    "student.frm=./small": "did you mean 'from'?",
}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrow")
    recipe = tiny_project(folder, GIVEN)
    small(folder, **TINY, max_position_embeddings=20)
    return recipe


@pytest.mark.parametrize("override", REFUSED)
def test_what_does_not_go_with_a_given_student_is_refused(override, narrow, tmp_path, capsys):
    assert main(["run", str(narrow), override, "--out", str(tmp_path / "run")]) == 2
    assert REFUSED[override] in capsys.readouterr().err


def test_keys_about_a_given_student_need_one(tmp_path, capsys):
    recipe = tiny_project(tmp_path)
    assert main(["validate", str(recipe), "student.sha256=" + "a" * 64]) == 2
    assert "student.sha256: has no effect: they are about the model of `from`" in capsys.readouterr().err


def test_heads_of_attention_that_cannot_be_compared_are_refused_when_the_student_is_built(tmp_path, capsys):
    recipe = tiny_project(tmp_path, GIVEN)
    small(tmp_path, **TINY, num_attention_heads=2, n_heads=2)
    assert main(["train", str(recipe), "losses.2={match: attention}", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "losses.2: attention.kl: student attention" in said and "train: started" not in said


def test_a_student_trained_for_the_classes_in_another_order_is_refused(first, tmp_path, capsys):
    recipe = copied(first, tmp_path, FITTED)
    names = {"id2label": {0: "none", 1: "mammal", 2: "swimmer"}, "label2id": {"none": 0, "mammal": 1, "swimmer": 2}}
    small(tmp_path, "bert", AutoModelForSequenceClassification, num_hidden_layers=2, **names)
    assert main(["run", str(recipe), "--out", str(tmp_path / "run")]) == 2
    words = "student.from: its class 0 is 'none' (id2label in its config.json), that of the run 'mammal'"
    assert words in capsys.readouterr().err


def test_the_plan_counts_the_memory_of_a_given_student(narrow, tmp_path, capsys):
    assert main(["plan", str(narrow), "--memory", "1GB"]) == 0
    assert "distilled" in capsys.readouterr().out
    assert main(["plan", str(narrow), "teacher.fit.steps=1", "--out", str(tmp_path / "run")]) == 0
    table = capsys.readouterr().out
    assert "labels_only" in table


def test_both_stacks_of_a_narrower_encoder_decoder_are_paired_and_trained(tmp_path, capsys):
    layers = "{keep: 2, choose: every}"
    cut = f"layers: {layers}\n  encoder_layers: {layers}\n  mlp: {{keep: 0.5, multiple_of: 8}}\n"
    recipe = two_stacks.RECIPE.replace(cut + "  calibration: {examples: 16, batch_size: 8}\n", "from: ./small\n")
    path = two_stacks.text_project(tmp_path, "t5")
    path.write_text(recipe.replace("steps: 140", "steps: 2").replace("steps: 40", "steps: 2"))
    sizes = {"d_model": 16, "d_ff": 24, "num_heads": 2, "num_layers": 3, "num_decoder_layers": 2}
    small(tmp_path, "t5", AutoModelForSeq2SeqLM, **sizes, eos_token_id=1, bos_token_id=None)
    assert main(["train", str(path), "--accept-weak-teacher", "--out", str(tmp_path / "run")]) == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert [layer["teacher_layer"] for layer in plan["encoder_layers"]] == [0, 1, 3]
    assert [layer["teacher_layer"] for layer in plan["layers"]] == [1, 3]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"hidden.mse.encoder", "hidden.mse.decoder"} <= records[-1]["terms"].keys()


def test_a_student_without_the_teachers_stacks_is_refused(tmp_path, capsys):
    path = two_stacks.text_project(tmp_path, "t5")
    small(tmp_path, "gpt2", AutoModelForCausalLM)
    assert main(["validate", str(path), "student={from: ./small}"]) == 2
    assert "student.from: gpt2 has one stack of layers, and task: seq2seq needs" in capsys.readouterr().err


def test_vectors_of_another_width_are_refused_when_the_student_is_built(tmp_path, capsys):
    path = embeddings.project(tmp_path)
    words = len(embeddings.SPECIALS) + len(embeddings.WORDS)
    small(tmp_path, "bert", vocab_size=words, hidden_size=16, num_attention_heads=2, num_hidden_layers=2)
    given = ["student={from: ./small}", "--accept-weak-teacher", "--out", str(tmp_path / "run")]
    assert main(["build", str(path), *given]) == 2
    assert "losses.0: output.cosine: " in capsys.readouterr().err
    assert main(["train", str(path), "losses=[{match: logits}]", "training.steps=2", *given]) == 0


def test_a_family_without_token_types_is_said_not_to_be_told_the_texts_of_a_pair_apart(tmp_path, capsys):
    path = tiny_project(tmp_path, GIVEN)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    parts = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1"}
    known = [(word, tokenizer.convert_tokens_to_ids(word)) for word in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**parts, special_tokens=known)
    tokenizer.save_pretrained(tmp_path / "teacher")
    settings = tmp_path / "teacher" / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | names))
    small(tmp_path, **TINY)
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row | {"pair": "dog cat"}) + "\n" for row in rows))
    given = ["data.columns={text: text, label: label, pair: pair}", "teacher.fit.steps=2", "training.steps=2"]
    assert main(["train", str(path), *given, "--out", str(tmp_path / "run")]) == 0
    assert "a distilbert knows no token types: of a pair it is not told which text is which" in capsys.readouterr().err


def test_a_student_of_the_hub_is_looked_at_before_the_first_stage(tmp_path, capsys, monkeypatch):
    path = tiny_project(tmp_path, GIVEN)
    small(tmp_path, **TINY, max_position_embeddings=20)
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tmp_path / "small", tmp_path / "hub" / "models--org--small" / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    given = ["student.from=org/small", f"student.revision={commit}", "teacher.fit.steps=1"]
    assert main(["plan", str(path), *given, "--out", str(tmp_path / "run")]) == 0
    assert "student.from: org/small is a distilbert of 2 layers" in capsys.readouterr().err
    given += ["data.max_length=30", "training.freeze=[nosuch*]"]
    assert main(["plan", str(path), *given, "--out", str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert "student.from: 30 tokens per example, it has 20 positions" in said and "matches no parameter" in said
    assert main(["plan", str(path), "student.from=org/none", "--out", str(tmp_path / "other")]) == 2
    assert "student.from: cannot get 'org/none' from the model hub" in capsys.readouterr().err


def test_a_random_cut_is_refused_where_nothing_is_cut(tmp_path, capsys):
    path = tiny_project(tmp_path, GIVEN)
    small(tmp_path, **TINY)
    assert main(["validate", str(path), "evaluation.arms=[distilled, random_cut]"]) == 2
    assert "nothing is cut" in capsys.readouterr().err

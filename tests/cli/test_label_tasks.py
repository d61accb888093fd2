"""Pairs, sets of classes, numbers and tags, each from a file to a release that a pipeline of transformers uses."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
from tiny import tiny_project
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from distill.cli import main

RECIPE = """\
name: labels
seed: 1
teacher:
  model: ./teacher
  init: random
  fit: {steps: 250, batch_size: 32, lr: 3e-3}
student:
  layers: {keep: 2, choose: every}
  mlp: {keep: 0.5, multiple_of: 8}
  calibration: {examples: 64, batch_size: 32}
data: {source: ./rows.jsonl, task: classification, max_length: 24}
losses:
  - {match: labels, weight: 0.3}
  - {match: logits}
  - {match: hidden}
training: {steps: 100, batch_size: 32, lr: 2e-3, evaluate_every: 50}
evaluation: {batch_size: 64, arms: [teacher, cut, distilled]}
release: {license: apache-2.0}
"""
WORDS = ("cat", "dog", "fish", "red", "green", "blue", "runs", "sleeps", "fast", "slow", "here", "there")
ROWS = 500


class Case(NamedTuple):
    """A task on rows that a small model learns."""

    family: str
    row: Any
    """(random words) -> a row of the file."""
    overrides: tuple[str, ...]
    said: str
    difference: str
    """Metric of the distance to the teacher."""
    metric: str
    least: float
    """Of the teacher on that metric: it has learned its task."""
    use: str
    """Python that makes `answer` with `pipeline` and the folder of the release."""
    answer: Any


def pair_row(words):
    first, second = words[:4], words[4:]
    label = f"{'cat' in first:d}{'dog' in second:d}"
    return {"text": " ".join(first), "other": " ".join(second), "label": label}


def set_row(words):
    return {"text": " ".join(words), "label": [name for name in ("cat", "dog", "fish") if name in words]}


def number_row(words):
    return {"text": " ".join(words), "label": 0.5 + words.count("cat") + 2.5 * ("dog" in words)}


def tag_row(words):
    tags = {"cat": "B-ANIMAL", "dog": "B-ANIMAL", "runs": "B-MOVE", "fast": "I-MOVE"}
    return {"tokens": words, "tags": [tags.get(word, "O") for word in words]}


CASES = {
    "pairs": Case(
        "bert", pair_row, ("data.columns.pair=other",), "labels: 4 classes", "kl", "accuracy", 0.9,
        """classify = pipeline("text-classification", model=folder)
answer = classify({"text": "red cat here there", "text_pair": "slow dog runs here"})["label"]""",
        "11",
    ),
    "sets": Case(
        "distilbert", set_row, ("training.keep_best=f1_micro",), "labels: sets of 3 classes", "kl", "f1_micro", 0.9,
        """found = pipeline("text-classification", model=folder, top_k=None)("red cat here dog runs fast here blue")
answer = sorted(each["label"] for each in found[0] if each["score"] > 0.5)""",
        ["cat", "dog"],
    ),
    "numbers": Case(
        "llama", number_row, ("teacher.fit.steps=150", "losses.1.loss=logit_mse", "student.repair.refit=true"),
        "labels: numbers from 0.5 to", "teacher_mse", "pearson", 0.9,
        """found = pipeline("text-classification", model=folder)("red cat here dog runs fast here blue")
answer = round(found[0]["score"])""",
        4,
    ),
    "tags": Case(
        "electra", tag_row,
        ("data.task=token_classification", "training.keep_best=entity_f1", "teacher.fit.steps=150",
         "student.layers.keep=1"),
        "labels: 4 tags, O, B-ANIMAL, B-MOVE, I-MOVE", "kl", "entity_f1", 0.9,
        """tags = pipeline("token-classification", model=folder, aggregation_strategy="simple")
found = tags("red cat runs fast here")
answer = [[each["entity_group"], each["start"], each["end"]] for each in found]""",
        [["ANIMAL", 4, 7], ["MOVE", 8, 17]],
    ),
}  # fmt: skip


def project(folder, case):
    recipe = tiny_project(folder, RECIPE, case.family)
    known = AutoTokenizer.from_pretrained(folder / "teacher")
    known.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    known.model_input_names = [*(["token_type_ids"] if case.family == "bert" else []), "input_ids", "attention_mask"]
    known.save_pretrained(folder / "teacher")
    chooser = random.Random(0)
    rows = [case.row(chooser.choices(WORDS, k=8)) for _ in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_student_comes_nearer_to_its_teacher_and_a_stock_pipeline_uses_it(name, tmp_path, capsys):
    case = CASES[name]
    recipe, run = project(tmp_path, case), tmp_path / "run"
    assert main(["run", str(recipe), *case.overrides, "--out", str(run)]) == 0
    assert case.said in capsys.readouterr().err
    found = json.loads((run / "evaluation.json").read_text())
    arms = {arm["name"]: arm["metrics"] for arm in found["arms"]}
    assert arms["teacher"][case.metric] > case.least
    assert arms["teacher"][case.difference] == 0
    assert arms["distilled"][case.difference] < arms["cut"][case.difference] / 2
    assert arms["distilled"][case.metric] >= arms["cut"][case.metric]
    wrong = "mse" if "mse" in arms["cut"] else "loss"
    assert arms["distilled"][wrong] < arms["cut"][wrong]
    assert found["efficiency"]["ratios"]["student"]["parameters"] < 1
    code = f"import json, sys\nfrom transformers import pipeline\nfolder = {str(run / 'release')!r}\n{case.use}\n"
    code += "assert 'distill' not in sys.modules\nprint(json.dumps(answer))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == case.answer
    assert "\n```\n\nIt prints" in (run / "release/README.md").read_text()

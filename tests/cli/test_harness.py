"""Tasks of lm-evaluation-harness: the same figures as its own command line has for the released folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conversations import byte_tokenizer
from tiny import tiny_config

from distill.errors import InputError, RecipeError
from distill.evaluation.harness import list_figures, load_tasks
from distill.recipe import load_recipe
from distill.recipe.sections import Harness

RECIPE = """\
name: tiny
seed: 1
teacher: {model: ./teacher, init: random, fit: {steps: 4, batch_size: 8, lr: 3e-3}}
student: {layers: {keep: 2}, mlp: {keep: 0.5, multiple_of: 8, protect: [0]}, calibration: {examples: 8, batch_size: 8}}
data: {source: ./texts.jsonl, task: causal_lm, max_length: 48}
losses: [{match: logits}]
training: {steps: 2, batch_size: 8}
evaluation:
  arms: [teacher, distilled]
  efficiency: false
  harness: {tasks: [animals, sounds], folder: ./tasks, limit: 12, batch_size: 4}
release: {license: apache-2.0, format: native}
"""
CHOICE = """\
task: animals
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
PERPLEXITY = """\
task: sounds
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""


def made_project(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "teacher")
    config = tiny_config("llama", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    config.save_pretrained(folder / "teacher")
    texts = [{"text": f"the {number}. cat sees {number % 7} dogs"} for number in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    asked = [{"question": f"the {number}. cat sees", "choices": [f"{number} dogs", "owls"]} for number in range(20)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    (folder / "tasks").mkdir()
    for name, text in (("animals", CHOICE), ("sounds", PERPLEXITY)):
        (folder / "tasks" / f"{name}.yaml").write_text(text % (folder / "asked.jsonl"))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


def python(*arguments, cwd):
    environment = {
        **os.environ,
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(cwd / "hf"),
    }
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=cwd, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


@pytest.mark.slow
def test_figures_are_those_of_its_own_command_line_on_the_released_folder(tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'distill[harness]'")
    recipe, run = made_project(tmp_path), tmp_path / "run"
    python("distill", "run", recipe, "--out", run, "--accept-weak-teacher", cwd=tmp_path)
    found = json.loads((run / "evaluation.json").read_text())["harness"]
    assert found["arms"].keys() == {"teacher", "distilled"} and found["limit"] == 12
    released = f"pretrained={run / 'release'},trust_remote_code=True"  # layers of unequal widths
    given = ["--tasks", "animals,sounds", "--include_path", tmp_path / "tasks", "--limit", 12, "--batch_size", 4]
    written = ["--device", "cpu", "--output_path", tmp_path / "out.json"]
    python("lm_eval", "--model", "hf", "--model_args", released, *given, *written, cwd=tmp_path)
    (result,) = (tmp_path).rglob("out*.json")
    theirs = json.loads(result.read_text())["results"]
    ours = {(own["task"], own["metric"]): own for own in found["arms"]["distilled"]}
    wanted = {("animals", "acc"), ("animals", "acc_norm"), ("sounds", "word_perplexity"), ("sounds", "byte_perplexity")}
    assert ours.keys() == wanted
    for (task, metric), own in ours.items():
        assert own["value"] == pytest.approx(theirs[task][f"{metric},none"], rel=1e-6)
        assert own["examples"] == 12
    assert ours["animals", "acc"]["stderr"] == pytest.approx(theirs["animals"]["acc_stderr,none"], rel=1e-6)
    assert "lm-evaluation-harness" in (run / "release/README.md").read_text()


def test_a_task_that_is_not_there_is_refused_before_anything_is_done(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"missing is no folder|pip install 'distill.harness.'"):
        load_tasks(Harness(tasks=["animals"], folder="./missing"), tmp_path / "missing")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"needs the package lm_eval: pip install"):
        load_tasks(Harness(tasks=["animals"]), None)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("tasks: [animals, sounds], folder: ./tasks, ", "", "names no task"),
        ("[animals, sounds]", "[animals, animals]", "the task animals is listed twice"),
        ("task: causal_lm", "task: masked_lm", "task: masked_lm makes none"),
        ("./tasks", "tasks", "evaluation.harness.folder"),
    ],
)
def test_a_harness_that_cannot_run_is_a_mistake_of_the_recipe(tmp_path, old, new, words):
    recipe = made_project(tmp_path)
    recipe.write_text(RECIPE.replace(old, new))
    with pytest.raises(RecipeError, match=words):
        load_recipe(recipe)


def test_a_figure_that_is_not_finite_is_listed_without_a_value_that_json_cannot_hold():
    figures = {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "ppl,f": float("inf"), "ppl_stderr,f": "N/A"}
    found = list_figures({"t": figures}, {"t": {"effective": 9}})
    assert json.loads(json.dumps(found, allow_nan=False)) == [
        {"task": "t", "metric": "acc", "value": 0.5, "stderr": 0.1, "examples": 9},
        {"task": "t", "metric": "ppl,f", "value": None, "stderr": None, "examples": 9},
    ]

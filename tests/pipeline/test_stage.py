"""A stage is done again when what it is made from or what it left behind is no longer the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from tiny import RECIPE, tiny_project

from distill.errors import InputError
from distill.files import write_text
from distill.pipeline import RunDir, Session, local_inputs, run_stages
from distill.pipeline.control import STAGE as CONTROL
from distill.recipe import load_recipe


def test_a_control_model_that_is_gone_is_trained_again_and_one_that_is_no_longer_asked_for_is_no_result(tmp_path):
    lines, run = [], tmp_path / "run"
    session = Session(load_recipe(tiny_project(tmp_path)), tmp_path, RunDir(run), lines.append)
    model = run / "controls/labels_only/model"
    train = replace(CONTROL, work=lambda _: write_text(model / "config.json", "{}"), inputs=lambda _: {})
    write_text(run / "controls/older/model/config.json", "{}")
    (run / ".lock").touch()
    run_stages(session, [train])
    assert list(json.loads((run / "stages/control.json").read_text())["results"]) == ["controls/labels_only/model"]
    run_stages(session, [train])
    assert lines[-1] == "control: unchanged, skipped"
    shutil.rmtree(model)
    run_stages(session, [train])
    assert "control: runs again (changed or missing: controls/labels_only/model)" in lines and model.exists()


def test_children_with_other_seeds_run_no_tasks_of_the_harness_whose_figures_nobody_reads(tmp_path):
    own = ["evaluation.seeds=3", "evaluation.harness={tasks: [some_task]}"]
    texts = RECIPE.replace("task: classification, labelled: 24,", "task: causal_lm,")
    recipe = load_recipe(tiny_project(tmp_path, texts, "llama"), own)
    session = Session(recipe, tmp_path, RunDir(tmp_path / "run"), print)
    assert [child.recipe.evaluation.harness for child in session.children] == [None, None]


def test_files_of_a_split_are_numbered_from_one(tmp_path):
    recipe = load_recipe(tiny_project(tmp_path))
    (tmp_path / "more.jsonl").write_text((tmp_path / "data.jsonl").read_text())
    assert local_inputs(recipe, tmp_path)["data.source"] == tmp_path / "data.jsonl"
    recipe = load_recipe(tmp_path / "recipe.yaml", ["data.source=./*.jsonl"])
    found = {path.name: name for name, path in local_inputs(recipe, tmp_path).items()}
    assert (found["data.jsonl"], found["more.jsonl"]) == ("file 1 of data.source", "file 2 of data.source")


def test_a_stage_that_is_not_wanted_is_not_checked(tmp_path):
    def refuse(_session):
        raise InputError("checked")

    session = Session(load_recipe(tiny_project(tmp_path)), tmp_path, RunDir(tmp_path / "run"), print)
    nothing = replace(CONTROL, work=lambda _: None, inputs=lambda _: {}, check=refuse, check_data=refuse)
    run_stages(session, [replace(nothing, wanted=lambda _: False)])
    with pytest.raises(InputError, match="checked"):
        run_stages(session, [nothing])

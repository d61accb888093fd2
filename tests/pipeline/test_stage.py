"""A stage is done again when what it is made from or what it left behind is no longer the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

from tiny import tiny_project

from distill.files import write_text
from distill.pipeline import RunDir, Session, run_stages
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

"""`distill plan`: the table of memory and speed, and the plan for a card that is not there."""

from __future__ import annotations

import pytest
from test_run import distill
from tiny import tiny_project

from distill.release.wording import MISSING


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny_project(tmp_path_factory.mktemp("planned"))


def rows(printed):
    """First cell -> the others, of every line of the tables."""
    lines = [line.strip("│ ").split("│") for line in printed.splitlines() if line.startswith("│")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_a_plan_says_what_every_training_takes_and_how_fast_it_is(project, tmp_path):
    printed = distill("plan", project, "--out", tmp_path / "run").stdout
    assert "teacher.fit" in printed and "distilled" in printed and "labels_only" in printed
    table = rows(printed)
    assert {"weights", "optimizer", "teacher", "activations", "peak", "fits", "tokens/s"} <= table.keys()
    assert table["fits"] == ["yes"] * 3
    assert table["teacher"][0] == table["teacher"][2] == MISSING and table["teacher"][1].endswith("MB")
    again = distill("plan", project, "--out", tmp_path / "run")
    assert "plan: unchanged, skipped" in again.stderr and "tokens/s" in again.stdout


def test_a_plan_for_a_card_needs_a_config_and_runs_nothing(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = ["teacher.init=pretrained", "teacher.fit=null"]
    assert "no weights" in distill("validate", project, *own, code=2).stderr
    printed = distill("plan", project, *own, "--memory", "80GB").stdout
    assert "80.00 GB" in printed and "tokens/s" not in printed and "teacher.fit" not in printed
    assert rows(printed)["fits"] == ["yes", "yes"]
    assert not list(tmp_path.iterdir())


def test_a_plan_says_what_would_make_it_fit(project):
    printed = distill("plan", project, "--memory", "1.2MB").stdout
    assert "needs" in printed
    assert any(label.endswith("micro_batch_size: 2") for label in rows(printed))


@pytest.mark.parametrize("size", ["80", "much", "0GB"])
def test_what_is_no_size_is_refused(project, size):
    assert "write a number and a unit" in distill("plan", project, "--memory", size, code=2).stderr


def test_a_size_that_has_to_be_measured_is_refused(project):
    own = ["student.target={latency: 0.5}", "student.mlp={multiple_of: 8}"]
    done = distill("plan", project, *own, "--memory", "80GB", code=2)
    assert "has to be measured" in done.stderr


@pytest.mark.parametrize("option", [["--out", "x"], ["--continue-from-changed"], ["--accept-weak-teacher"]])
def test_an_option_of_a_run_beside_memory_is_refused_as_nothing_is_run(project, option):
    done = distill("plan", project, "--memory", "80GB", *option, code=2)
    assert f"{option[0]}: with --memory nothing is run" in done.stderr


def test_an_arm_without_a_teacher_is_timed_whatever_the_teacher_is(project, tmp_path):
    table = distill("plan", project, "teacher.device=cpu", "--out", tmp_path / "run").stdout
    speeds = rows(table)["tokens/s"]
    assert speeds[1] == MISSING and MISSING not in (speeds[0], speeds[2])
    assert "labels_only: a teacher" not in table and "distilled: a teacher" in table

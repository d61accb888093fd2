"""Processes that wait for the main one do so for as long as it takes, whatever the timeout of collective operations."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from forked import HANG, Processes
from tiny import RECIPE, tiny_project
from torch.distributed.distributed_c10d import _set_pg_timeout

from distill.files import write_json
from distill.pipeline.folder import RunDir
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage, run_stages
from distill.ranks import process_state
from distill.recipe import load_recipe

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
TIMEOUT, LONGER = 5, 7
"""Seconds: of collective operations, half an hour otherwise, and what the main process takes for one thing."""


def two_stages(recipe, end):
    state = process_state()
    _set_pg_timeout(timedelta(seconds=TIMEOUT))

    def slow(session):
        time.sleep(LONGER)
        if end == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        write_json(session.folder.evaluation, {})

    def inputs(_session):
        time.sleep(LONGER if end == "finished" else 0)  # as where large folders are read to see what has changed
        return {}

    def together(_session):
        print("together", state.process_index)

    stages = [
        Stage("slow", slow, inputs, lambda session: [session.folder.evaluation]),
        Stage("next", together, lambda session: {}, lambda session: [session.folder.evaluation], together=True),
    ]
    run_stages(Session(load_recipe(recipe), recipe.parent, RunDir(recipe.parent / "run"), say=print), stages)


@pytest.mark.slow
def test_a_stage_of_the_main_process_may_take_longer_than_the_timeout(tmp_path):
    started = Processes(tmp_path / "log", two_stages, tiny_project(tmp_path), "finished", ranks=2)
    assert started.wait() == [0, 0], started.said
    assert "together 0" in started.said and "together 1" in started.said


def test_a_main_process_that_dies_ends_the_others(tmp_path):
    started = Processes(tmp_path / "log", two_stages, tiny_project(tmp_path), "killed", ranks=2)
    assert started.wait() == [-signal.SIGKILL, 1] and "together" not in started.said


@pytest.mark.slow
def test_a_mistake_that_only_the_main_process_meets_is_said_once_and_ends_the_others(tmp_path):
    (tmp_path / "policies.py").write_text("def beyond(layers, keep, statistics):\n    return [0, 9]\n")
    recipe = tiny_project(tmp_path, RECIPE.replace("choose: every", "choose: policies:beyond"))
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    command = ["--config_file", ROOT / "recipes/accelerate/cpu-2.yaml", ROOT / "scripts/train.py", recipe]
    done = subprocess.run(
        [*launcher, *command, "--out", tmp_path / "run"],
        env={**ENV, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode != 0 and "plan: started" in done.stderr and "build: started" not in done.stderr
    assert done.stderr.count("error: student.layers.choose: policies:beyond") == 1
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if was_given(path, str(tmp_path))]


def was_given(path, words):
    """Whether a process, which may have ended by now, was started with these words."""
    try:
        return words in path.read_text()
    except OSError:
        return False

"""Processes that wait for the main one do so for as long as it takes, whatever the timeout of collective operations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import RECIPE, tiny_project

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
HANG = 600
STAGES = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
from accelerate import PartialState
from torch.distributed.distributed_c10d import _set_pg_timeout
state = PartialState(cpu=True)
_set_pg_timeout(timedelta(seconds=8))  # of collective operations, half an hour otherwise

from distill.recipe import load_recipe
from distill.files import write_json
from distill.pipeline.folder import RunDir
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage, run_stages
recipe, end = Path(sys.argv[1]), sys.argv[2]

def slow(session):
    time.sleep(12)
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    write_json(session.folder.evaluation, {})

def inputs(session):
    time.sleep(12)  # as where large folders are read to see whether they have changed
    return {}

def together(session):
    print("together", state.process_index, flush=True)

stages = [
    Stage("slow", slow, inputs, lambda session: [session.folder.evaluation]),
    Stage("next", together, lambda session: {}, lambda session: [session.folder.evaluation], together=True),
]
run_stages(Session(load_recipe(recipe), recipe.parent, RunDir(recipe.parent / "run"), say=print), stages)
"""


def launched(folder, end):
    script = folder / "stages.py"
    script.write_text(STAGES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    return subprocess.run(
        [*command, script, tiny_project(folder), end],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )


@pytest.mark.slow
def test_a_stage_of_the_main_process_may_take_longer_than_the_timeout(tmp_path):
    done = launched(tmp_path, "finished")
    assert done.returncode == 0, done.stderr
    assert "together 0" in done.stdout and "together 1" in done.stdout


@pytest.mark.slow
def test_a_main_process_that_dies_ends_the_others(tmp_path):
    done = launched(tmp_path, "killed")
    assert done.returncode != 0 and "together" not in done.stdout


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

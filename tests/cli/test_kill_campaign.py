"""Counts of the fault campaign: kills that were inside a save, and checkpoints that cannot be read.

The campaign itself is a step of `.ci/run`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Processes, run_script
from tiny import tiny_project

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

KILLS = """
import json, sys, time
FOREVER = 10**6
from pathlib import Path
sys.path.insert(0, "scripts")
from kill_campaign import Run, telling

def saves(notify, *seconds):
    for duration in seconds:
        telling(time.sleep, notify)(duration)
    notify("over")
    time.sleep(FOREVER)
    return 0

found = []
for seconds in ([FOREVER], [0, FOREVER], [0, 0, 0]):
    run = Run(lambda notify: saves(notify, *seconds), Path(sys.argv[1]) / "log")
    assert run.wait_for("saving", skip=len(seconds) - 1)
    assert seconds[-1] or run.wait_for("over")
    assert run.kill()
    found.append(run.saving)
print(json.dumps(found))
"""
UNREADABLE = {"missing": None, "empty": "", "cut": '{"made_from', "not an object": "[]", "an empty object": "{}"}


def test_a_kill_after_the_save_is_not_one_inside_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path], env=ENV, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, True, False]


@pytest.fixture
def campaign(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import kill_campaign

    yield kill_campaign
    del sys.modules["kill_campaign"]


@pytest.mark.parametrize("state", UNREADABLE)
def test_a_checkpoint_whose_state_cannot_be_read_is_unusable(campaign, state, tmp_path):
    assert campaign.usable(tmp_path)
    checkpoint = tmp_path / "checkpoints/step-00000003"
    checkpoint.mkdir(parents=True)
    if UNREADABLE[state] is not None:
        (checkpoint / "state.json").write_text(UNREADABLE[state])
    assert not campaign.usable(tmp_path)


def test_a_file_of_save_state_that_cannot_be_read_makes_its_checkpoint_unusable(campaign, tmp_path):
    assert campaign.plain_usable(tmp_path)
    (tmp_path / "plain/checkpoints/checkpoint_0").mkdir(parents=True)
    assert not campaign.plain_usable(tmp_path)


def test_a_campaign_of_one_kill_ends_at_the_same_weights(tmp_path):
    settings = ["training.save_every=2", "--kills", "1", "--out", tmp_path / "out"]
    started = Processes(
        tmp_path / "log", run_script, ROOT / "scripts/kill_campaign.py", tiny_project(tmp_path), *settings
    )
    assert started.wait() == [0], started.said
    counts = json.loads(started.said[started.said.rindex("{") :])
    assert counts["kills in training"] == 1 and counts["ended at the same weights"] >= 1
    assert counts.keys() == {"kills in training", "ended at the same weights"}

"""What the fault campaign counts: kills that were inside a save, and checkpoints that cannot be read."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from test_faults import ENV, ROOT

KILLS = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, "scripts")
from kill_campaign import Run, telling

def saves(notify, *seconds):
    for duration in seconds:
        telling(time.sleep, notify)(duration)
    time.sleep(20)
    return 0

found = []
for seconds in ([20], [0, 20], [0, 0, 0]):
    run = Run(lambda notify: saves(notify, *seconds), Path(sys.argv[1]) / "log")
    assert run.wait_for("saving", skip=len(seconds) - 1)
    time.sleep(0.5)
    assert run.kill()
    found.append(run.saving)
print(json.dumps(found))
"""
UNREADABLE = {"missing": None, "empty": "", "cut": '{"identity', "not an object": "[]", "without identity": "{}"}


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

    return kill_campaign


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

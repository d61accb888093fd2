"""The fault campaign in short: no kill costs a published checkpoint or a bit of the final weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_project

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


# With workers each kill takes five seconds more: so long they need to notice that their parent is dead.
@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills", "in_saves"), [(0, 20, 10), (1, 3, 1)])
def test_killed_again_and_again_training_ends_at_the_same_weights(workers, kills, in_saves, tmp_path):
    recipe = tiny_project(tmp_path)
    settings = ["training.steps=60", "training.save_every=3", "training.ema=0.9", f"training.loader_workers={workers}"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/kill_campaign.py", recipe, *settings, "--kills", str(kills),
         "--in-saves", str(in_saves), "--out", tmp_path / "out"],
        env=ENV, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout[done.stdout.index("{") :])
    assert counts["kills in training"] == kills and counts["kills in saving"] == in_saves  # those that missed it on top
    assert counts["ended at the same weights"] >= 1 and "newest checkpoint unusable" not in counts

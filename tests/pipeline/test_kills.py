"""Whatever replaces something is killed at each of its system calls: the old or the new is whole, and a start mends."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from forked import Processes
from killed import each_death

from distill.files import fresh_folder, sha256_of, write_json, write_text
from distill.pipeline.folder import RunDir
from distill.training.checkpoint import Checkpoints, TrainState, fault_of

NAMES = ("README.md", "model.safetensors", "1_Pooling/config.json")


def fill(folder, text):
    for name in NAMES:
        write_text(folder / name, text)


def publish(run):
    with fresh_folder(run / "release") as folder:
        fill(folder, "new")


def start(run):
    with RunDir(run).locked():
        pass


def version(folder):
    """The text in all files of a folder, which is whole and of one version; None: there is no folder."""
    texts = {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}
    assert not folder.exists() or (sorted(texts) == sorted(NAMES) and len({*texts.values()}) == 1), texts
    return next(iter(texts.values()), None)


def publishing(root):
    """Kill a publication, then the start that mends it; each publishes in the end."""
    os.fsync = lambda _file: None

    def released(number):
        run = root / f"{number}"
        fill(run / "release", "old")
        (run / ".lock").touch()
        return run

    deaths, seen, states = 0, set(), set()
    for run in each_death(released, publish):
        deaths += 1
        aside = run / ".release.old"
        held = version(run / "release") or version(aside)
        assert held in ("old", "new")
        seen.add((held, (run / "release").exists()))
        state = tuple(sorted(str(path.relative_to(run)) for path in run.rglob("*")))
        if state in states:
            continue
        states.add(state)
        again = 0
        for copy in each_death(lambda number, run=run: Path(shutil.copytree(run, f"{run}-{number}")), start):
            again += 1
            start(copy)
            assert version(copy / "release") == held and not (copy / ".release.old").exists()
            publish(copy)
            assert version(copy / "release") == "new" and sorted(os.listdir(copy)) == [".lock", "release"]
        assert again >= 3
    # Killed before, between and after the two moves.
    assert deaths >= 25 and seen == {("old", True), ("old", False), ("new", True)}, (deaths, seen)


def writing(root):
    """Kill the replacement of a file."""

    def written(number):
        path = root / f"{number}/plan.json"
        write_json(path, ["old"])
        return path

    found = []
    for path in each_death(written, lambda path: write_json(path, ["new"])):
        found.append(path.read_text())
        write_json(path, ["new"])
        assert os.listdir(path.parent) == ["plan.json"]
    assert {*found} == {'[\n "old"\n]\n', '[\n "new"\n]\n'} and len(found) >= 5


def saving(root):
    """Kill the publication of a checkpoint."""

    def checkpoints(folder):
        return Checkpoints(folder, {"seed": 1}, lambda _line: None, keep=1)

    def save(folder, step):
        own = checkpoints(folder)
        own.make_draft(step)
        weights = own.draft(step) / "model.safetensors"
        weights.write_bytes(b"weights")
        own.publish(TrainState(step=step), {weights.name: sha256_of(weights)})

    def saved(number):
        save(root / f"{number}", 1)
        return root / f"{number}"

    found = []
    for folder in each_death(saved, lambda folder: save(folder, 2)):
        newest = checkpoints(folder).newest_valid()
        assert newest is not None and fault_of(newest) is None
        found.append(newest.name)
        save(folder, 3)
        assert checkpoints(folder).newest_valid().name == "step-00000003"
    assert {*found} == {"step-00000001", "step-00000002"} and len(found) >= 20


@pytest.mark.parametrize("campaign", [publishing, writing, saving])
def test_a_kill_at_any_system_call_leaves_the_old_or_the_new_whole(campaign, tmp_path):
    processes = Processes(tmp_path / "log", campaign, tmp_path / "runs")
    assert processes.wait() == [0], processes.said

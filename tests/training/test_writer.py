"""Checkpoints written behind training are those written in place, and nothing that was saved is lost."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time

import pytest
import torch
from forked import Processes
from running import MADE_FROM, published, run
from safetensors.torch import load_file, save_file
from test_safety import equal
from tiny import tiny_corpus, tiny_project

from distill.errors import RunError, Stopped
from distill.ranks import _left_of_limits
from distill.training import checkpoint, read_records, shards, writer
from distill.training.checkpoint import Checkpoints, TrainState, fault_of, state_of
from distill.training.snapshot import HostMemory
from distill.training.watchdog import Watchdog
from distill.training.writer import CheckpointWriter

W = {"model": {"w": torch.zeros(3), "b": torch.zeros(())}}


@pytest.fixture
def behind(tmp_path):
    """A writer of checkpoints in an empty folder."""
    said = []
    with CheckpointWriter(Checkpoints(tmp_path / "checkpoints", MADE_FROM, said.append), said.append) as made:
        yield made
        made.settle()


def saved(behind, step, tensors=W):
    behind.save([behind.checkpoints], TrainState(step=step), tensors, whole=True)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def let_go(monkeypatch):
    """As many files are written as this semaphore is released for."""
    semaphore = threading.Semaphore(0)

    def held(*given, **named):
        semaphore.acquire()
        save_file(*given, **named)

    monkeypatch.setattr(shards, "save_file", held)
    yield semaphore
    semaphore.release(100)


@pytest.fixture
def slowly(monkeypatch):
    """Every file takes its time; returns for each how many were under way when it was begun."""
    under_way, counts = [], []

    def slow(*given, **named):
        under_way.append(given)
        counts.append(len(under_way))
        time.sleep(0.2)
        save_file(*given, **named)
        under_way.pop()

    monkeypatch.setattr(shards, "save_file", slow)
    return counts


def test_what_is_written_behind_training_is_to_the_byte_what_is_written_in_place(corpus, tmp_path, monkeypatch):
    _, said = run(corpus, tmp_path / "behind", ema=0.9)
    assert said == []
    monkeypatch.setattr(writer, "free_memory", lambda: 1000)
    _, said = run(corpus, tmp_path / "in place", ema=0.9)
    (line,) = said  # of three checkpoints
    assert line.startswith("checkpoints are written in place, and training waits for it")
    for first in published(tmp_path / "behind/checkpoints"):
        second = tmp_path / "in place/checkpoints" / first.name
        assert names(first) == names(second) and fault_of(first) is None
        files = [path.name for path in first.glob("*.safetensors")]
        assert len(files) == 4
        for name in files:
            assert (first / name).read_bytes() == (second / name).read_bytes(), name
        assert state_of(first) == state_of(second)


def test_in_place_means_that_it_is_published_when_save_returns(behind, monkeypatch, slowly):
    monkeypatch.setattr(writer, "free_memory", lambda: 0)
    for step in (1, 2):
        saved(behind, step)
        assert names(behind.checkpoints.folder)[-1] == f"step-0000000{step}"
    assert behind.memory.buffers == {}


def test_what_changes_after_save_is_not_in_the_file(behind, let_go):
    weights, state = {"model": {"w": torch.arange(3.0), "b": torch.ones(())}}, TrainState(step=1, tokens=7)
    behind.save([behind.checkpoints], state, weights, whole=True)
    for tensor in weights["model"].values():
        tensor.fill_(float("nan"))
    state.step, state.tokens = 2, 8
    assert behind.checkpoints.published() == []
    let_go.release()
    behind.settle()
    (only,) = behind.checkpoints.published()
    assert {name: tensor.tolist() for name, tensor in load_file(only / "model.safetensors").items()} == {
        "w": [0, 1, 2],
        "b": 1,
    }
    assert state_of(only) == TrainState(step=1, tokens=7) and fault_of(only) is None


def test_the_memory_of_a_copy_is_that_of_the_one_before(behind):
    saved(behind, 1)
    before = {key: buffer.data_ptr() for key, buffer in behind.memory.buffers.items()}
    saved(behind, 2)
    assert before == {key: buffer.data_ptr() for key, buffer in behind.memory.buffers.items()} and len(before) == 2
    saved(behind, 3, {"model": {"w": torch.ones(5), "b": torch.zeros((), dtype=torch.int64)}})  # as masks are chosen
    behind.settle()
    assert load_file(behind.checkpoints.published()[-1] / "model.safetensors")["w"].tolist() == [1] * 5


def test_memory_is_taken_before_the_first_copy_needs_it(behind, corpus, tmp_path, monkeypatch):
    behind.prepare(W, whole=True)
    assert behind.memory.lacking(shards.own_files(W, 0, 1, whole=True)) == 0
    before = {key: buffer.data_ptr() for key, buffer in behind.memory.buffers.items()}
    saved(behind, 1)
    assert before == {key: buffer.data_ptr() for key, buffer in behind.memory.buffers.items()} and len(before) == 2
    lacking, copy = [], HostMemory.copy

    def noted(memory, files):
        lacking.append(memory.lacking(files))
        return copy(memory, files)

    monkeypatch.setattr(HostMemory, "copy", noted)
    run(corpus, tmp_path / "run")
    assert lacking == [0, 0, 0]  # also for the moments, which are there after the first step


def test_one_is_written_at_a_time_and_published_without_being_waited_for(behind, let_go):
    for step in (1, 2, 3):
        saved(behind, step)
        before = [f"step-0000000{earlier}" for earlier in range(1, step)]
        assert names(behind.checkpoints.folder) == [f".tmp-step-0000000{step}", *before]
        let_go.release()
    while names(behind.checkpoints.folder) != ["step-00000002", "step-00000003"]:
        time.sleep(0.01)


def test_the_best_and_the_newest_are_one_copy_and_the_best_is_published_first(corpus, tmp_path, monkeypatch, slowly):
    order, rename = [], os.rename

    def noted(source, target):
        order.append(str(target.relative_to(tmp_path / "checkpoints")))
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", noted)
    values = iter([0.5, 0.4, 0.9])
    job = {"evaluate": lambda *_: {"accuracy": next(values)}}
    run(corpus, tmp_path, job=job, evaluate_every=2, keep_best="accuracy")
    assert order == ["best/step-00000002", "step-00000002", "step-00000004", "best/step-00000006", "step-00000006"]
    assert set(slowly) == {1}


def train_until_killed(folder, step):
    """Train, and die of SIGKILL between the files of that step and their name."""
    rename = os.rename

    def fatal(source, target):
        if target.name == f"step-{step:08d}":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.rename = fatal
    (folder / "project").mkdir(parents=True)
    tiny_project(folder / "project")
    run(tiny_corpus(folder / "project", seed=0), folder)


def test_a_kill_between_the_copy_and_the_publication_leaves_the_last_published_one(corpus, tmp_path):
    started = Processes(tmp_path / "log", train_until_killed, tmp_path / "run", 4)
    assert started.wait() == [-signal.SIGKILL], started.said
    assert names(tmp_path / "run/checkpoints") == [".tmp-step-00000004", "step-00000002"]
    assert fault_of(tmp_path / "run/checkpoints/step-00000002") is None
    model, said = run(corpus, tmp_path / "run")
    assert "continuing after step 2" in said[0] and equal(model, run(corpus, tmp_path / "whole")[0])
    assert names(tmp_path / "run/checkpoints") == ["step-00000004", "step-00000006"]


def test_what_fails_behind_training_ends_it_at_the_next_save(corpus, tmp_path):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # as a quota does
    try:
        with pytest.raises(RunError, match=r"a checkpoint cannot be written: .*; there is no checkpoint yet"):
            run(corpus, tmp_path, log_every=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert names(tmp_path / "checkpoints") == []


def test_weights_that_are_not_finite_end_it_at_the_next_save(behind):
    saved(behind, 1)
    saved(behind, 2, {"model": {"w": torch.tensor([0, float("-inf"), 1]), "b": torch.tensor(True), "e": torch.ones(0)}})
    with pytest.raises(RunError, match=r"weights are not finite \(w\): not saved; the last good .*step-00000001"):
        saved(behind, 3)
    assert names(behind.checkpoints.folder) == ["step-00000001"]


def test_a_stop_waits_for_what_it_tells_to_be_saved(corpus, tmp_path, slowly):
    def evaluate(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"accuracy": 0.5}

    with pytest.raises(Stopped, match="after step 3 of 6; a checkpoint is saved"):
        run(corpus, tmp_path, job={"evaluate": evaluate}, evaluate_every=3)
    assert names(tmp_path / "checkpoints") == ["step-00000002", "step-00000003"]


def test_an_error_of_training_does_not_lose_what_was_saved_before(corpus, tmp_path, slowly):
    def evaluate(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(corpus, tmp_path, job={"evaluate": evaluate}, evaluate_every=3)
    assert names(tmp_path / "checkpoints") == ["step-00000002"]


def test_a_second_signal_does_not_wait(corpus, tmp_path, let_go):
    def evaluate(*_):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="by a second signal, at once"):
        run(corpus, tmp_path, job={"evaluate": evaluate}, evaluate_every=3)
    assert published(tmp_path / "checkpoints") == []


def test_a_rank_that_waits_for_a_checkpoint_has_patience_for_as_long_as_writing_took():
    watchdog = Watchdog(print, active=False)
    for _ in range(2):
        with watchdog.guard("publication"):
            pass
        watchdog.note("publication", 20.0)
    with watchdog.guard("publication"):
        assert 90 < watchdog.deadline - time.monotonic() <= 100


def test_memory_is_what_the_tightest_limit_above_the_process_leaves(tmp_path):
    job = tmp_path / "slurm/job_7"
    job.mkdir(parents=True)
    (tmp_path / "own").write_text("1:name=systemd:/x\n0::/slurm/job_7/step\n")
    (job / "memory.max").write_text("1000\n")
    (job / "memory.current").write_text("700\n")
    (job / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    (job.parent / "memory.max").write_text("max\n")
    assert list(_left_of_limits(tmp_path, tmp_path / "own")) == [500]
    assert list(_left_of_limits(tmp_path, tmp_path / "none")) == []

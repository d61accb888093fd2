"""Signals at any moment, to any process: a checkpoint where there is something to save, exit code 75, and no orphan."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import tiny_project

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
HANG = 600
"""Seconds after which something is taken to hang, however busy the machine is."""
LONG = ["training.steps=5000", "training.save_every=0", "training.log_every=1", "training.evaluate_every=3"]
ONE_PROCESS = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
TWO_PROCESSES = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
SCRIPT = str(ROOT / "scripts/train.py")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A run that is finished up to the student as cut: (recipe, run folder)."""
    folder = tmp_path_factory.mktemp("signals")
    recipe = tiny_project(folder)
    command = [sys.executable, "-m", "distill", "build", str(recipe), *LONG, "--out", str(folder / "run")]
    subprocess.run(command, check=True, env=ENV, capture_output=True)
    return recipe, folder / "run"


@pytest.fixture
def start(built, tmp_path):
    """Start the training of the student in a copy of that run; returns (process, run folder)."""
    recipe, run = built
    subprocess.run(["cp", "-r", str(run), str(tmp_path / "run")], check=True)
    started = []

    def begin(launcher, *overrides, env=()):
        command = [*launcher, str(recipe), *LONG, *overrides, "--out", str(tmp_path / "run")]
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, env={**ENV, **dict(env)}, stderr=log, start_new_session=True)
        started.append(process)
        return process, tmp_path / "run"

    yield begin
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for worker in workers(tmp_path):  # the elastic agent gives each a session of its own
        os.kill(worker, signal.SIGKILL)


def until(condition):
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


def said(run, words):
    return lambda: words in (run.parent / "log").read_text()


def recorded(run, event):
    path = run / "metrics.jsonl"
    return lambda: path.exists() and f'"event": "{event}"' in path.read_text()


def workers(folder):
    """Process ids of the training processes that a launcher has started for a run in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if SCRIPT.encode() in words[1:3] and str(folder / "run").encode() in words:  # python [-u] SCRIPT
            found.append(int(path.parent.name))
    return found


def exit_code_of(process):
    try:
        return process.wait(timeout=HANG)
    except subprocess.TimeoutExpired:
        pytest.fail("it is still there")


DIRECT = [sys.executable, "-m", "distill", "train"]
MOMENTS = {
    "while the teacher is loaded": lambda run: said(run, "train: started"),
    "around the first batch": lambda run: said(run, "train: started"),
    "in the middle of training": lambda run: recorded(run, "train"),
    "around an evaluation": lambda run: recorded(run, "evaluate"),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_one_process_is_exit_code_of_with_its_work_saved(start, moment, number):
    process, run = start(DIRECT)
    until(MOMENTS[moment](run))
    time.sleep(1.0 if moment == "around the first batch" else 0.0)
    process.send_signal(number)
    assert exit_code_of(process) == 75
    log = (run.parent / "log").read_text()
    assert "the same command continues" in log and "Traceback" not in log
    if recorded(run, "train")():
        (saved,) = (run / "checkpoints").glob("step-*")
        assert f"after step {int(saved.name[5:])} of 5000" in log
        assert load_file(saved / "model.safetensors")


def test_loader_workers_get_the_signal_too_and_the_step_is_finished(start):
    process, run = start(DIRECT, "training.loader_workers=2")
    until(recorded(run, "train"))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
    assert exit_code_of(process) == 75
    assert list((run / "checkpoints").glob("step-*"))


def test_a_signal_to_a_launcher_of_one_process_leaves_no_orphan(start):
    process, run = start([*ONE_PROCESS, SCRIPT])
    until(recorded(run, "train"))
    (worker,) = workers(run.parent)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=HANG)
    until(lambda: worker not in workers(run.parent))
    assert list((run / "checkpoints").glob("step-*")), (run.parent / "log").read_text()


@pytest.mark.parametrize("target", ["launcher", "one of them"])
@pytest.mark.parametrize("moment", ["while the teacher is loaded", "in the middle of training"])
def test_two_processes_stop_together(start, target, moment):
    process, run = start([*TWO_PROCESSES, SCRIPT], env={"ACCELERATE_USE_CPU": "true"})
    until(MOMENTS[moment](run))
    if target == "launcher":
        process.send_signal(signal.SIGTERM)
    else:
        os.kill(workers(run.parent)[-1], signal.SIGTERM)
    assert exit_code_of(process) != 0
    until(lambda: not workers(run.parent))
    if recorded(run, "train")():
        assert list((run / "checkpoints").glob("step-*")), (run.parent / "log").read_text()


def test_a_process_that_hangs_ends_the_others(start):
    _, run = start([*TWO_PROCESSES, SCRIPT], env={"ACCELERATE_USE_CPU": "true"})
    until(recorded(run, "train"))
    os.kill(workers(run.parent)[-1], signal.SIGSTOP)
    until(said(run, "do not answer"))


@pytest.mark.parametrize(
    ("launcher", "env"),
    [
        ([*ONE_PROCESS[:-2], "2", "--cpu"], {}),
        ([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"], {}),
        (
            [*TWO_PROCESSES[:3], "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"],
            {"ACCELERATE_USE_CPU": "true"},
        ),
    ],
    ids=["accelerate launch --cpu --num_processes 2", "torchrun without the variable", "FSDP on a CPU"],
)
def test_a_real_launch_that_is_not_what_it_seems_is_refused(start, launcher, env):
    process, run = start([*launcher, SCRIPT], env=env)
    process.wait(timeout=HANG)
    log = (run.parent / "log").read_text()
    assert process.returncode != 0 and "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2" in log
    assert "train: started" not in log

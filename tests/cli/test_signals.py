"""Signals at any moment, to any process: a checkpoint where there is something to save, exit code 75, and no orphan."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import HANG, Processes
from safetensors.torch import load_file
from tiny import tiny_project

from distill.cli import main
from distill.training import watchdog

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
LONG = ["training.steps=5000", "training.save_every=0", "training.log_every=1", "training.evaluate_every=3"]
ONE_PROCESS = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
TWO_PROCESSES = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
SCRIPT = str(ROOT / "scripts/train.py")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A run that is finished up to the student as cut: (recipe, run folder)."""
    folder = tmp_path_factory.mktemp("signals")
    recipe = tiny_project(folder)
    assert main(["build", str(recipe), *LONG, "--out", str(folder / "run")]) == 0
    return recipe, folder / "run"


@pytest.fixture
def copied(built, tmp_path):
    """A copy of that run; returns the arguments that train its student there, and its folder."""
    recipe, run = built
    shutil.copytree(run, tmp_path / "run")
    return [str(recipe), *LONG, "--out", str(tmp_path / "run")], tmp_path / "run"


@pytest.fixture
def start(copied, tmp_path):
    """Start the training with a launcher; returns (process, run folder)."""
    arguments, run = copied
    started = []

    def begin(launcher, env=()):
        with (tmp_path / "log").open("w") as log:
            command = [*launcher, *arguments]
            process = subprocess.Popen(command, env={**ENV, **dict(env)}, stderr=log, start_new_session=True)
        started.append(process)
        return process, run

    yield begin
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for worker in workers(tmp_path):  # the elastic agent gives each a session of its own
        os.kill(worker, signal.SIGKILL)


@pytest.fixture
def fork(copied, tmp_path):
    """Start the training in processes that need no launcher; returns (processes, run folder)."""
    arguments, run = copied
    started = []

    def begin(*overrides, ranks=1, patience=None):
        started.append(Processes(tmp_path / "log", train, [*arguments, *overrides], patience, ranks=ranks))
        return started[0], run

    yield begin
    for processes in started:
        processes.kill()


def train(arguments, patience):
    if patience is not None:
        watchdog.PATIENCE = patience
    sys.exit(main(["train", *arguments]))


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


MOMENTS = {
    "while the teacher is loaded": lambda run: said(run, "train: started"),
    "around the first batch": lambda run: said(run, "train: started"),
    "in the middle of training": lambda run: recorded(run, "train"),
    "around an evaluation": lambda run: recorded(run, "evaluate"),
}


def assert_saved(run):
    log = (run.parent / "log").read_text()
    assert "the same command continues" in log and "Traceback" not in log
    if recorded(run, "train")():
        (saved,) = (run / "checkpoints").glob("step-*")
        assert f"after step {int(saved.name[5:])} of 5000" in log
        assert load_file(saved / "model.safetensors")


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        *((moment, signal.SIGTERM) for moment in MOMENTS),
        ("while the teacher is loaded", signal.SIGINT),
        ("around an evaluation", signal.SIGINT),
    ],
)
def test_one_process_is_ended_with_its_work_saved(fork, moment, number):
    processes, run = fork()
    until(MOMENTS[moment](run))
    time.sleep(0.3 if moment == "around the first batch" else 0.0)
    os.kill(processes.each[0].pid, number)
    assert processes.wait() == [75]
    assert_saved(run)


@pytest.mark.slow
def test_the_command_itself_ends_with_its_work_saved(start):
    process, run = start([sys.executable, "-m", "distill", "train"])
    until(recorded(run, "train"))
    process.send_signal(signal.SIGINT)
    assert exit_code_of(process) == 75
    assert_saved(run)


def test_loader_workers_get_the_signal_too_and_the_step_is_finished(fork):
    processes, run = fork("training.loader_workers=2")
    until(recorded(run, "train"))
    os.killpg(processes.each[0].pid, signal.SIGINT)  # as a terminal does on Ctrl-C
    assert processes.wait() == [75]
    assert_saved(run)


@pytest.mark.slow
def test_a_signal_to_a_launcher_of_one_process_leaves_no_orphan(start):
    process, run = start([*ONE_PROCESS, SCRIPT])
    until(recorded(run, "train"))
    (worker,) = workers(run.parent)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=HANG)
    until(lambda: worker not in workers(run.parent))
    assert list((run / "checkpoints").glob("step-*")), (run.parent / "log").read_text()


@pytest.mark.slow
def test_a_signal_to_a_launcher_of_two_processes_ends_both_with_their_work_saved(start):
    process, run = start([*TWO_PROCESSES, SCRIPT], env={"ACCELERATE_USE_CPU": "true"})
    until(recorded(run, "train"))
    process.send_signal(signal.SIGTERM)
    assert exit_code_of(process) != 0
    until(lambda: not workers(run.parent))
    assert list((run / "checkpoints").glob("step-*")), (run.parent / "log").read_text()


@pytest.mark.parametrize("signalled", [[1], [0, 1]])
@pytest.mark.parametrize("moment", ["while the teacher is loaded", "in the middle of training"])
def test_two_processes_stop_together(fork, moment, signalled):
    processes, run = fork(ranks=2)
    until(MOMENTS[moment](run))
    for rank in signalled:
        os.kill(processes.each[rank].pid, signal.SIGTERM)
    codes = processes.wait()
    # Where one leaves before there are steps to stop after, the other's next collective operation fails.
    assert {75} <= set(codes) <= ({75, 1} if moment == "while the teacher is loaded" else {75}), processes.said
    if recorded(run, "train")():
        assert_saved(run)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others(fork):
    processes, run = fork(ranks=2, patience=10.0)
    until(recorded(run, "evaluate"))  # the first step and the first evaluation may take many minutes
    os.kill(processes.each[1].pid, signal.SIGSTOP)
    until(said(run, "do not answer"))
    until(lambda: processes.each[0].exitcode == 1)


CHECK = """
import sys
from distill.errors import InputError
from distill.ranks import check_launch, process_state

state = process_state()
try:
    check_launch(state.num_processes, state.device.type)
except InputError as error:
    sys.exit(f"refused: {error}")
"""
"""What every run does first, and nothing else."""


@pytest.mark.slow
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
def test_a_real_launch_that_is_not_what_it_seems_is_refused(launcher, env, tmp_path):
    (tmp_path / "check.py").write_text(CHECK)
    command = [*launcher, tmp_path / "check.py"]
    done = subprocess.run(command, env={**ENV, **env}, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode != 0, done.stderr
    assert "refused: " in done.stderr
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2" in done.stderr

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from distill.errors import InputError
from distill.ranks import check_launch
from distill.training.signals import StopSignals

HANG = 600
"""Seconds after which something is taken to hang, however busy the machine is."""
RIGHT = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 scripts/train.py RECIPE"
ONE = {"ACCELERATE_MIXED_PRECISION": "no"}
REFUSED = {
    "two that do not know each other": (1, "cpu", {"WORLD_SIZE": "2"}, "started 2 processes, but each of them runs"),
    "--cpu --num_processes 2": (1, "cpu", {**ONE, "MASTER_ADDR": "127.0.0.1"}, "asked for several processes and"),
    "FSDP on a CPU": (2, "cpu", {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "FSDP was asked for"),
}
ACCEPTED = [
    (1, "cpu", {}),
    (1, "cpu", ONE),
    (2, "cpu", {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", **ONE}),
    (8, "cuda", {"WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "ACCELERATE_USE_FSDP": "true", **ONE}),
    (1, "cpu", {"MASTER_ADDR": "127.0.0.1"}),  # a variable of the shell, and no launcher
]


@pytest.mark.parametrize("case", REFUSED)
def test_a_launch_that_does_something_else_is_refused_with_the_right_command(case):
    world, device, environment, words = REFUSED[case]
    with pytest.raises(InputError) as caught:
        check_launch(world, device, environment)
    assert words in str(caught.value) and RIGHT in str(caught.value)


@pytest.mark.parametrize(("world", "device", "environment"), ACCEPTED)
def test_a_launch_that_does_what_it_seems_to_is_accepted(world, device, environment):
    check_launch(world, device, environment)


def test_the_first_signal_is_noted_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert StopSignals.active and not stop.asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked()
    assert not StopSignals.active and signal.getsignal(signal.SIGTERM) == before


STUCK = """
import signal, sys, time
from distill.training.signals import leaving_in_time
signal.signal(signal.SIGTERM, lambda *_: None)   # as where a library swallows the exception
with leaving_in_time(1.0):
    print("ready", flush=True)
    while True:
        time.sleep(0.1)
"""


def test_a_process_that_does_not_come_to_its_handler_is_gone_in_time():
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=HANG) == 75
    process.stdout.close()


HANGING = """
import sys, time
from distill.training import watchdog
watchdog.PATIENCE = 1.0
dog = watchdog.Watchdog(lambda text: print(text, flush=True), active=True)
for what, seconds in {sequence}:
    with dog.over(what):
        time.sleep(seconds)
    print("done", what, flush=True)
"""
FOREVER = 10**6


def watched(*sequence):
    code = HANGING.replace("{sequence}", repr(sequence))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG, check=False)


@pytest.mark.parametrize("what", ["step", "evaluation", "save"])
def test_a_step_that_waits_for_others_in_vain_ends_the_process_with_a_message(what):
    done = watched((what, 0.1), (what, 0.1), (what, FOREVER))
    assert done.returncode == 1 and "do not answer" in done.stdout


def test_the_first_step_may_take_its_time_and_says_nothing_about_the_others():
    done = watched(("step", 3.0), ("step", 0.0), ("evaluation", 3.0), ("step", FOREVER))
    assert done.stdout.splitlines()[:3] == ["done step", "done step", "done evaluation"]
    assert done.returncode == 1 and "do not answer" in done.stdout


ORPHAN = """
import subprocess, sys, time
child = '''
import time
from distill.training.signals import die_with_parent
die_with_parent()
print("up", flush=True)
time.sleep(10**6)
'''
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
process.stdout.readline()
print(process.pid, flush=True)
time.sleep(10**6)
"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_process_is_told_when_its_parent_dies():
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + HANG
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)
    parent.stdout.close()

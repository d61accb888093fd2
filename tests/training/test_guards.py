from __future__ import annotations

import os
import signal
import time

import pytest
from forked import HANG, Processes

from distill.errors import InputError
from distill.ranks import check_launch
from distill.training import watchdog
from distill.training.signals import StopSignals, die_with_parent, leaving_in_time

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


def stick():
    signal.signal(signal.SIGTERM, lambda *_: None)  # as where a library swallows the exception
    with leaving_in_time(1.0):
        print("ready")
        time.sleep(HANG)


def until(condition):
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


def test_a_process_that_does_not_come_to_its_handler_is_gone_in_time(tmp_path):
    started = Processes(tmp_path / "log", stick)
    until(lambda: started.said == "ready\n")
    os.kill(started.each[0].pid, signal.SIGTERM)
    assert started.wait() == [75]


def hang(*sequence):
    watchdog.PATIENCE = 0.5
    dog = watchdog.Watchdog(print, active=True)
    for what, seconds in sequence:
        with dog.guard(what):
            time.sleep(seconds)
        print("done", what)


def watched(folder, *sequence):
    started = Processes(folder / "log", hang, *sequence)
    assert started.wait() == [1]
    return started.said


@pytest.mark.parametrize("what", ["step", "evaluation", "save"])
def test_a_step_that_waits_for_others_in_vain_ends_the_process_with_a_message(what, tmp_path):
    assert "do not answer" in watched(tmp_path, (what, 0.1), (what, 0.1), (what, HANG))


def test_the_first_step_may_take_its_time_and_says_nothing_about_the_others(tmp_path):
    said = watched(tmp_path, ("step", 2.0), ("step", 0.0), ("evaluation", 2.0), ("step", HANG)).splitlines()
    assert said[:3] == ["done step", "done step", "done evaluation"] and "do not answer" in said[3]


def raise_a_child():
    if os.fork() == 0:
        die_with_parent()
        print(os.getpid())
    time.sleep(HANG)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_process_is_told_when_its_parent_dies(tmp_path):
    started = Processes(tmp_path / "log", raise_a_child)
    until(lambda: started.said.endswith("\n"))
    child = int(started.said)
    assert alive(child)
    started.kill()
    until(lambda: not alive(child))

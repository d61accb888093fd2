"""An action that is killed right before each of its system calls in turn, each time in a copy of this process."""

from __future__ import annotations

import os
import signal
import sys
from itertools import count

SEEN = {"open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir", "os.link", "os.truncate"}
"""Audit events of calls that look at or change a folder; of `fsync` there is none."""


def dies(number, action):
    """Call `action` in a copy of this process that is killed before call `number`; tells if it made so many."""
    child = os.fork()
    if child == 0:
        calls = count(1)

        def call(*_given):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(lambda event, _given: call() if event in SEEN else None)
        os.fsync = call  # this machine keeps its power, so that nothing need reach the disk
        action()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def each_death(prepare, action):
    """Yield what `prepare(number)` returns after `action` on it was killed before its call 1, 2, …, and once whole."""
    for number in count(1):
        place = prepare(number)
        died = dies(number, lambda place=place: action(place))
        yield place
        if not died:
            return

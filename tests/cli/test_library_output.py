"""What Python and libraries print by themselves reaches the terminal without what would steer it."""

from __future__ import annotations

import subprocess
import sys

EVIL = "\x1b]0;owned\x07\x1b[2Jevil\x9b31m"
PROGRAM = f"""
import logging, threading, warnings
from distill import cli

def main(_arguments):
    warnings.warn({EVIL!r})
    logging.getLogger("library").error("%s of a file", {EVIL!r})
    thread = threading.Thread(target=lambda: int({EVIL!r}))
    thread.start()
    thread.join()
    raise ValueError({EVIL!r})

cli.main = main
cli.entry([])
"""


def test_warnings_records_and_tracebacks_of_libraries_do_not_steer_the_terminal():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("owned") >= 4 and "Traceback (most recent call last)" in done.stderr
    assert not {"\x1b", "\x07", "\x9b"} & {*done.stderr}, done.stderr

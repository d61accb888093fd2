"""Install the oldest transformers that distill is for, into a folder of its own, to load a release with it too."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from distill.errors import InputError


def oldest_version(package: str = "transformers") -> str:
    """Read the lowest version that distill's own metadata allows of a package."""
    asked = importlib.metadata.requires("distill") or []
    return next(found[1] for each in asked if (found := re.fullmatch(rf"{package}>=([\d.]+)", each)))


@contextmanager
def oldest_installed(say: Callable[[str], None]) -> Iterator[Path]:
    """Install that transformers, and what it needs except torch, into a temporary folder, with pip and the network.

    Raises:
        InputError: It cannot be had.
    """
    wanted = f"transformers=={oldest_version()}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    say(f"--check-oldest: pip installs {wanted} for this command")
    with TemporaryDirectory() as folder:
        done = subprocess.run(  # noqa: S603 (pip, on a name of our own)
            [*command, "--target", folder, wanted], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"--check-oldest: pip cannot install {wanted}, for which it needs the network: {reason}")
        yield Path(folder)

"""GPUs are hidden from the tests and from all processes that they start, but for the tests that are marked `gpu`.

CUDA looks at CUDA_VISIBLE_DEVICES once per process, when it is first used. So importing this hides them: nothing is
left that a CPU test could take a GPU by, and a test marked `gpu` gets an interpreter of its own.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import torch

HANG = 600
"""Seconds after which something is taken to hang, however busy the machine is."""
GIVEN, ON_GPU, EVERY = "DISTILL_TESTS_GPUS", "DISTILL_TESTS_ON_GPU", "every GPU"
"""Variables: CUDA_VISIBLE_DEVICES as the tests were started with, or `EVERY`; and that this interpreter is that of a
test marked `gpu`."""
VISIBLE = ON_GPU in os.environ

os.environ.setdefault(GIVEN, os.environ.get("CUDA_VISIBLE_DEVICES", EVERY))
if not VISIBLE:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run all the same; Triton looks once, when it is imported
    # FSDP and device meshes ask what torch was built for, not what is there: it answers as a build for CPUs does.
    torch._C._get_accelerator = lambda: torch.device("cpu")
    torch._C._accelerator_getAccelerator = lambda: None


def start(*arguments):
    """Run Python with the GPUs that the tests were started with."""
    hidden = "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET"
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {ON_GPU: "1"}
    if os.environ[GIVEN] != EVERY:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ[GIVEN]
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG, check=False)


@functools.cache
def is_there():
    """Tell whether tests can have a GPU, without touching it in this process."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return VISIBLE or (torch.version.cuda is not None and start("-c", code).returncode == 0)

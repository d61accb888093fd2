"""Processes for tests, alone or as the ranks of one launch, copied from one that has imported everything.

A new interpreter imports torch and transformers for longer than most tests take. The copies are real processes: with
signals, exit codes and collective operations of their own. What launchers do is tested with launchers, in tests/cli.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys

import torch.distributed
from gpus import HANG

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "distill.cli",
        "distill.pipeline",
        "distill.pipeline.release",
        "datasets.packaged_modules",
        "pandas",
        "torch._dynamo",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "transformers.generation.utils",
        "transformers.models.bert.modeling_bert",
        "transformers.models.llama.modeling_llama",
    ]
)
CPU = {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def _become(log, environment, function, arguments):
    """Call a function as a program: in a session of its own, with its own variables and output."""
    os.setsid()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout.reconfigure(line_buffering=True)
    function(*arguments)


def run_script(path, *arguments):
    """Be a script that Python was started with."""
    sys.argv, sys.path[0] = [str(path), *map(str, arguments)], str(path.parent)
    runpy.run_path(str(path), run_name="__main__")


class Processes:
    """`ranks` processes that call `function(*arguments)` and write to one log; more than one know each other."""

    def __init__(self, log, function, *arguments, ranks=1, **environment):
        self.log = log
        log.write_text("")
        # As an elastic agent does, this process holds the store in which the ranks find each other.
        self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": self.store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
                  "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": 0}  # fmt: skip
        self.each = []
        for rank in range(ranks):
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {}
            variables = {**CPU, **{key: str(value) for key, value in own.items()}, **environment}
            process = CONTEXT.Process(target=_become, args=(log, variables, function, arguments))
            process.start()
            self.each.append(process)

    @property
    def said(self):
        """What they have written so far."""
        return self.log.read_text()

    def wait(self):
        """Wait for all of them, and return their exit codes; negative: killed by a signal."""
        for process in self.each:
            process.join(HANG)
        try:
            assert None not in [process.exitcode for process in self.each], f"it hangs\n{self.said}"
            return [process.exitcode for process in self.each]
        finally:
            self.kill()

    def kill(self):
        """End what is left of them."""
        for process in self.each:
            process.kill()
            process.join()

"""Rank, world size, device and memory of this process, and the launches that are refused."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import InputError

if TYPE_CHECKING:
    from accelerate import PartialState

SCRIPT = "scripts/train.py RECIPE"


def process_state() -> PartialState:
    """Return rank, world size and device of this process.

    Raises:
        InputError: DeepSpeed was asked for and is not installed.
    """
    if (
        parse_flag(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false"))
        and importlib.util.find_spec("deepspeed") is None
    ):
        raise InputError("the launch asks for DeepSpeed, which is not installed: pip install 'distill[deepspeed]'")
    from accelerate import PartialState

    return PartialState(cpu=parse_flag(os.environ.get("ACCELERATE_USE_CPU", "false")))


def free_memory() -> int:
    """Return the bytes of main memory that this process can have without swapping and within its cgroup's limits.

    Those of the whole machine where nothing more is known.
    """
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, LookupError, ValueError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_left_of_limits()])


def _left_of_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Yield the bytes that each limit on memory leaves, of this process's cgroup (version 2) and those above it."""
    try:
        group = root / own.read_text(encoding="utf-8").partition("0::/")[2].partition("\n")[0]
    except OSError:
        return
    for folder in (group, *group.parents):
        try:
            limit, used = (int((folder / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):  # no limit, or none that can be read
            continue
        yield max(0, limit - used + int(stat.get("inactive_file", 0)))  # cached files give way


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether `accelerate launch` or `torchrun` started this process."""
    return "ACCELERATE_MIXED_PRECISION" in environment or "TORCHELASTIC_RUN_ID" in environment


def check_launch(world_size: int, device: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a launch that does something else than it seems to.

    Args:
        world_size: Number of ranks that Accelerate sees.
        device: The kind of device that Accelerate trains on, e.g. `cpu`.
        environment: Variables that the launcher has set.

    Raises:
        InputError: With the command that does what was meant.
    """
    started = int(environment.get("WORLD_SIZE", "1"))
    right = f"  ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {max(2, started)} {SCRIPT}"
    if started != world_size:
        # They would all believe that they are the main one, and write the same files.
        message = f"the launcher started {started} processes, but each of them runs alone. On CPU use:\n{right}"
        raise InputError(message)
    # For several processes without `--multi_gpu` or a GPU, `accelerate launch` sets an address and starts one.
    alone = environment.get("MASTER_ADDR") == "127.0.0.1" and "WORLD_SIZE" not in environment
    if alone and "ACCELERATE_MIXED_PRECISION" in environment:
        raise InputError(
            f"accelerate launch was asked for several processes and started one, as it does with --cpu. Use:\n{right}\n"
            f"or, for one process:\n  accelerate launch --num_processes 1 {SCRIPT}"
        )
    for name, flag in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        if device == "cpu" and parse_flag(environment.get(flag, "false")):
            raise InputError(f"{name} was asked for, which on a CPU silently becomes DDP. Without GPUs use:\n{right}")


def shards_weights(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether the launcher has asked for FSDP or DeepSpeed, which place weights themselves."""
    return any(parse_flag(environment.get(f"ACCELERATE_USE_{name}", "false")) for name in ("FSDP", "DEEPSPEED"))


def parse_flag(text: str) -> bool:
    """Parse a flag as Accelerate's launcher writes it."""
    return text.lower() in ("1", "true", "yes", "y", "on", "t")

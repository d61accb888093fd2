"""The ready-made launch files say what their names promise."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

FOLDER = Path(__file__).parents[2] / "recipes/accelerate"
EXPECTED = {
    # processes, machines, DDP launcher, FSDP
    "one-gpu": (1, 1, False, False),
    "ddp-8": (8, 1, True, False),
    "fsdp2": (8, 1, False, True),
    "two-nodes": (16, 2, True, False),
    "cpu-2": (2, 1, True, False),
}


def test_every_launch_file_is_expected():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_it_as_meant(name):
    arguments = ["--config_file", str(FOLDER / f"{name}.yaml"), "scripts/train.py", "RECIPE"]
    read, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert (read.num_processes, read.num_machines, read.multi_gpu, read.use_fsdp) == EXPECTED[name]
    assert not read.use_deepspeed and not read.cpu
    if name == "fsdp2":
        assert int(read.fsdp_version) == 2 and read.fsdp_state_dict_type == "FULL_STATE_DICT"

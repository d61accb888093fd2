"""The ready-made launch files say what their names promise."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import DeepSpeedPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from distill.recipe.schema import Training
from distill.training.deepspeed import configure_deepspeed

FOLDER = Path(__file__).parents[2] / "recipes/accelerate"
EXPECTED = {
    # processes, machines, DDP launcher, FSDP, DeepSpeed
    "one-gpu": (1, 1, False, False, False),
    "ddp-8": (8, 1, True, False, False),
    "fsdp2": (8, 1, False, True, False),
    "zero3": (8, 1, False, False, True),
    "two-nodes": (16, 2, True, False, False),
    "cpu-2": (2, 1, True, False, False),
}


def test_every_launch_file_is_expected():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_it_as_meant(name):
    arguments = ["--config_file", str(FOLDER / f"{name}.yaml"), "scripts/train.py", "RECIPE"]
    read, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    found = (read.num_processes, read.num_machines, read.multi_gpu, read.use_fsdp, read.use_deepspeed)
    assert found == EXPECTED[name] and not read.cpu
    if name == "fsdp2":
        assert int(read.fsdp_version) == 2 and read.fsdp_state_dict_type == "FULL_STATE_DICT"
    if name == "zero3":
        assert int(read.zero_stage) == 3 and not read.zero3_init_flag


def test_what_the_launcher_hands_over_for_zero3_is_taken(monkeypatch):
    # Any free port: with its own choice the launcher warns where another training runs on this machine.
    arguments = ["--config_file", str(FOLDER / "zero3.yaml"), "--main_process_port", "0", "scripts/train.py", "RECIPE"]
    read, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    read.deepspeed_fields_from_accelerate_config = "zero_stage"
    _, environment = prepare_deepspeed_cmd_env(read)
    for key, value in environment.items():
        if key.startswith("ACCELERATE_"):
            monkeypatch.setenv(key, value)
    plugin = DeepSpeedPlugin()
    spec = Training(steps=1, batch_size=32, lr=1e-3)
    configure_deepspeed(SimpleNamespace(deepspeed_plugin=plugin, gradient_accumulation_steps=2), spec, 2)
    assert plugin.zero_stage == 3 and not plugin.zero3_init_flag
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == 2

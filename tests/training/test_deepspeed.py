"""DeepSpeed shares out the same training: really run, on two processes of a CPU, where it is installed."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from accelerate import DeepSpeedPlugin
from launched import STEPS, launched
from safetensors.torch import load_file
from test_processes import assert_close
from tiny import tiny_model

from distill.errors import InputError
from distill.losses import Objective
from distill.ranks import check_launch
from distill.recipe.schema import Term, Training
from distill.training import read_records
from distill.training.checkpoint import fault_of
from distill.training.deepspeed import configure_deepspeed
from distill.training.learner import SHARDING
from distill.training.setup import make_learner

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="pip install -e '.[deepspeed]'")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process from beginning to end."""
    folder = tmp_path_factory.mktemp("one") / "run"
    launched(1, folder, "plain")
    return folder


@pytest.mark.slow
@needs_deepspeed
def test_zero3_trains_saves_resumes_and_hands_over_the_same_student(one, tmp_path):
    folder = tmp_path / "run"
    launched(2, folder, "zero3", "8:0", codes=[75, 75])
    (newest,) = sorted((folder / "checkpoints").glob("step-*"))[-1:]
    assert newest.name == "step-00000008" and fault_of(newest) is None
    shutil.copytree(folder, tmp_path / "on one")
    assert "continuing after step 8" in launched(2, folder, "zero3")
    assert_close(folder, one)
    assert "continuing after step 8" in launched(1, tmp_path / "on one", "plain")  # one kind of checkpoint for all
    assert_close(tmp_path / "on one", one)


@pytest.mark.slow
@needs_deepspeed
def test_what_one_process_saved_two_continue_with_zero2(one, tmp_path):
    folder = tmp_path / "run"
    launched(1, folder, "plain", "8:0", codes=[75])
    assert "continuing after step 8" in launched(2, folder, "zero2")
    assert_close(folder, one)


@pytest.mark.slow
@needs_deepspeed
def test_a_second_training_in_the_same_processes_is_one_of_its_own(one, tmp_path):
    launched(2, tmp_path / "run", "zero2-second")
    assert_close(tmp_path / "run", one)


@pytest.mark.slow
@needs_deepspeed
def test_the_head_of_a_language_model_is_read_in_chunks(tmp_path):
    launched(1, tmp_path / "one", "plain-lm")
    launched(2, tmp_path / "two", "zero3-lm")
    assert_close(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_a_gradient_that_is_no_number_on_one_process_leaves_out_the_step_on_both(kind, tmp_path):
    launched(2, tmp_path, kind, "0:0", "nan")
    records = [record for record in read_records(tmp_path / "metrics.jsonl") if record["event"] == "train"]
    assert [record["skipped"] for record in records] == [0] * 2 + [1] * (STEPS - 2)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "final.safetensors").values())


def configured(stage=2, spec=None, **plugin):
    plugin = DeepSpeedPlugin(zero_stage=stage, **plugin)
    accelerator = SimpleNamespace(deepspeed_plugin=plugin, gradient_accumulation_steps=4)
    configure_deepspeed(accelerator, Training(steps=1, batch_size=8, lr=1e-3, **(spec or {})), 2)
    return plugin.deepspeed_config


def test_the_recipe_decides_batch_accumulation_and_clipping():
    found = configured(3, {"max_grad_norm": 0.5})
    wanted = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "gradient_clipping": 0.5}
    assert wanted.items() <= found.items()
    assert configured(spec={"max_grad_norm": None})["gradient_clipping"] == 0


@pytest.mark.parametrize(
    ("stage", "spec", "plugin", "message"),
    [
        (1, {}, {}, "use 2 or 3"),
        (3, {}, {"offload_param_device": "cpu"}, "offload"),
        (2, {}, {"offload_optimizer_device": "cpu"}, "offload"),
        (2, {"precision": "fp16"}, {}, "fp16"),
        (2, {"ema": 0.9}, {}, "training.ema"),
    ],
)
def test_what_does_not_go_with_deepspeed_is_refused(stage, spec, plugin, message):
    with pytest.raises(InputError, match=message):
        configured(stage, spec, **plugin)


def test_masks_do_not_go_with_deepspeed():
    objective = Objective([Term(match="labels")], "sequence")
    accelerator = SimpleNamespace(distributed_type=SHARDING[1])
    with pytest.raises(InputError, match=r"student\.mask"):
        spec = Training(steps=1, batch_size=8, lr=1e-3)
        make_learner(tiny_model("bert"), objective, spec, lambda _student: object(), accelerator)


def test_deepspeed_on_a_cpu_is_refused():
    with pytest.raises(InputError, match="DeepSpeed was asked for, which on a CPU silently becomes DDP"):
        check_launch(8, "cpu", {"WORLD_SIZE": "8", "ACCELERATE_USE_DEEPSPEED": "true"})
    check_launch(8, "cuda", {"WORLD_SIZE": "8", "ACCELERATE_USE_DEEPSPEED": "true"})

"""The same command with other values: what changes only rounding goes on, what changes more goes on when asked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model, tiny_project
from torch.nn.modules.module import register_module_forward_pre_hook

from distill.cli import main
from distill.training.model import DistillModel

RECIPE = """\
name: continuing
teacher: {model: ./teacher}
student:
  layers: {keep: 2, choose: every}
  mlp: {keep: 0.5, multiple_of: 8}
  calibration: {examples: 8, batch_size: 8}
data: {source: ./data.jsonl, task: causal_lm, max_length: 16}
losses:
  - {match: labels, weight: 0.5}
  - {match: logits}
training: {steps: 12, save_every: 4, batch_size: 8, micro_batch_size: 4, lr: 1e-3, schedule: constant, warmup: 0, log_every: 4}
evaluation: {batch_size: 8, efficiency: false, arms: [teacher, cut, distilled]}
release: {license: apache-2.0}
"""  # noqa: E501
ASKED = "--continue-from-changed"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A language model without dropout, trained for 12 steps: (recipe, run folder)."""
    folder = tmp_path_factory.mktemp("continuing")
    recipe = tiny_project(folder, RECIPE, family="llama")
    tiny_model("llama", pad_token_id=0).save_pretrained(folder / "teacher")
    assert main(["train", str(recipe), "--out", str(folder / "run")]) == 0
    return recipe, folder / "run"


@pytest.fixture
def again(finished, tmp_path, capsys):
    """Give the command again in a copy of that run; returns (run folder, what it said)."""
    recipe, run = finished
    shutil.copytree(run, tmp_path / "run")

    def give(*arguments, code=0):
        assert main(["train", str(recipe), *arguments, "--out", str(tmp_path / "run")]) == code
        return capsys.readouterr().err

    return tmp_path / "run", give


def stop_before_the_end(run):
    """Leave what a kill between the last two checkpoints leaves."""
    shutil.rmtree(run / "checkpoints/step-00000012")
    shutil.rmtree(run / "distilled")
    (run / "stages/train.json").unlink()


def weights(run):
    return load_file(run / "distilled/model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def started(said):
    return [line.split(":")[0] for line in said.splitlines() if line.endswith("started")]


@pytest.mark.parametrize("other", ["micro_batch_size=2", "micro_batch_size=null", "loader_workers=1", "compile=true"])
def test_a_finished_training_is_not_done_again_for_what_changes_only_rounding(again, other):
    run, give = again
    before = (run / "distilled/model.safetensors").read_bytes()
    assert started(give(f"training.{other}")) == []
    assert (run / "distilled/model.safetensors").read_bytes() == before


def test_a_stopped_training_goes_on_with_smaller_micro_batches(again, finished):
    run, give = again
    stop_before_the_end(run)
    said = give("training.micro_batch_size=2")
    assert "continuing after step 8 of 12" in said and "passed over" not in said and started(said) == ["train"]
    assert "micro_batch_size is 2 and was 4: this changes nothing but rounding" in said
    whole = weights(finished[1])
    assert not same(weights(run), whole)  # sums are taken in another order
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-5, msg=name)


def test_the_same_command_after_a_stop_is_bitwise_the_whole_training(again, finished):
    run, give = again
    stop_before_the_end(run)
    said = give("training.loader_workers=1", "training.gradient_checkpointing=true")
    assert "continuing after step 8 of 12" in said and "rounding" not in said
    assert same(weights(run), weights(finished[1]))


def test_a_signal_saves_a_checkpoint_and_the_same_command_ends_at_the_same_weights(again, finished):
    run, give = again
    for made_by_training in ("checkpoints", "distilled"):
        shutil.rmtree(run / made_by_training)
    passes = iter(range(10**6))

    def interrupt(module, _inputs):  # in the second pass of step 7, which is noticed when step 8 begins
        if isinstance(module, DistillModel) and next(passes) == 13:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_module_forward_pre_hook(interrupt)
    try:
        said = give("training.save_every=0", code=75)
    finally:
        hook.remove()
    assert "after step 8 of 12; a checkpoint is saved, the same command continues" in said
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000008"]
    assert "continuing after step 8 of 12" in give("training.save_every=0")
    assert same(weights(run), weights(finished[1]))


def test_more_steps_begin_anew_and_name_the_key_and_the_option(again):
    run, give = again
    said = give("training.steps=16")
    assert "train: runs again (training.steps: 12 → 16)" in said
    assert f"step-00000012 is passed over: it was made from other inputs (training.steps: 12 → 16); {ASKED}" in said
    assert "continuing" not in said and (run / "checkpoints/step-00000016").is_dir()


def test_more_steps_go_on_when_asked_as_one_longer_training_would(again, finished, tmp_path):
    run, give = again
    said = give("training.steps=20", ASKED)
    assert "step-00000012 is continued with other inputs (training.steps: 12 → 20)" in said
    assert "continuing after step 12 of 20" in said
    assert started(give("training.steps=20")) == []
    recipe, _ = finished
    assert main(["train", str(recipe), "training.steps=20", "--out", str(tmp_path / "whole")]) == 0
    assert same(weights(run), weights(tmp_path / "whole"))  # at a constant rate there is no difference
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 8, 12, 16, 20]


def test_every_key_that_differs_is_named_and_the_rest_is_counted(again):
    _, give = again
    said = give("training.lr=2e-3", "losses.1.temperature=2.0", "losses.0.weight=1.0")
    for change in ("training.lr: 0.001 → 0.002", "losses.0.weight: 0.5 → 1.0", "losses.1.temperature: 1.0 → 2.0"):
        assert said.count(change) == 3, change  # the stage, and both checkpoints
    seven = ("betas=[0.8, 0.99]", "warmup=2", "schedule=linear", "max_grad_norm=2.0", "max_skipped=3",
             "weight_decay=0.5", "lr=3e-3")  # fmt: skip
    said = give(*(f"training.{key}" for key in seven))
    assert "3 more)" in said  # seven, and the two of the losses, which are back


@pytest.mark.parametrize("other", ["optimizer=torch.optim:SGD", "ema=0.9", "freeze=['*embed*']"])
def test_what_decides_which_tensors_are_kept_cannot_be_continued(again, other):
    _, give = again
    said = give(f"training.{other}", ASKED, code=2)
    key = other.split("=")[0]
    assert f"cannot be continued with another training.{key} (training.{key}: " in said and "Traceback" not in said


def test_a_shorter_training_begins_anew_also_when_asked(again):
    run, give = again
    said = give("training.steps=2", ASKED)
    assert "step-00000012 is passed over: it is after step 12 and this training has 2" in said
    assert (run / "checkpoints/step-00000002").is_dir()


def test_a_checkpoint_of_another_student_is_refused_by_its_tensors(again):
    _, give = again
    said = give("student.mlp.keep=0.25", ASKED, code=1)
    assert "student: other content" in said and "the checkpoint holds other tensors than the model" in said


def test_a_checkpoint_that_does_not_say_what_it_was_made_from_is_passed_over(again):
    run, give = again
    for checkpoint in (run / "checkpoints").iterdir():
        state = json.loads((checkpoint / "state.json").read_text())
        text = json.dumps({"identity": "0" * 64, **{k: v for k, v in state.items() if k != "made_from"}})
        (checkpoint / "state.json").write_text(text)
        manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
        manifest["state.json"] = hashlib.sha256(text.encode()).hexdigest()
        (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))
    (run / "stages/train.json").write_text('{"made_from": "older", "results": {}}')
    said = give("training.steps=4", ASKED)
    assert (
        said.count("passed over: it was written by an older version, without made_from") == 2
        and "continuing" not in said
    )


def test_a_result_that_was_changed_is_named(again):
    run, give = again
    (run / "distilled/config.json").write_text("{}")
    said = give()
    assert "train: runs again (changed or missing: distilled)" in said and "continuing after step 12 of 12" in said

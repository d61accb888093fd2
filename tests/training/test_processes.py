"""Any number of processes, and any way to share a model out to them, is the same training."""

from __future__ import annotations

import shutil

import pytest
import torch
from launched import LONG, STEPS, launched
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import AutoModelForSequenceClassification

from distill.training import read_records
from distill.training.checkpoint import fault_of
from distill.training.shards import read

pytestmark = pytest.mark.slow


def assert_close(folder, reference, steps=STEPS, tolerance=1e-5):
    first, second = load_file(folder / "final.safetensors"), load_file(reference / "final.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if ".key.bias" not in name:  # its true gradient is 0, and AdamW makes steps of size lr of the rounding noise
            torch.testing.assert_close(tensor, second[name], rtol=0, atol=tolerance, msg=name)
    losses = [
        [record["loss"] for record in read_records(path / "metrics.jsonl") if record["event"] == "train"]
        for path in (folder, reference)
    ]
    assert len(losses[0]) == steps and losses[0] == pytest.approx(losses[1], abs=tolerance)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process from beginning to end."""
    folder = tmp_path_factory.mktemp("one") / "run"
    launched(1, folder)
    return folder


def test_saved_on_one_resumed_on_two_and_back_is_the_same_training(tmp_path):
    folder = tmp_path / "run"
    assert "after step 17 of 50" in launched(1, folder, "ddp-long", "17:0", codes=[75])
    launched(2, folder, "ddp-long", "17:1", codes=[75, 75])  # the evaluation after step 17 is made up for
    assert "continuing after step 34" in launched(1, folder, "ddp-long")
    launched(1, tmp_path / "one", "ddp-long")
    assert_close(folder, tmp_path / "one", LONG)


def test_fsdp2_trains_saves_resumes_and_exports_the_same_student(one, tmp_path):
    folder = tmp_path / "run"
    launched(2, folder, "fsdp", "8:0", codes=[75, 75])
    (newest,) = sorted((folder / "checkpoints").glob("step-*"))[-1:]
    assert newest.name == "step-00000008" and fault_of(newest) is None
    shutil.copytree(folder, tmp_path / "on one")
    assert "continuing after step 8" in launched(2, folder, "fsdp")
    assert_close(folder, one)
    exported = AutoModelForSequenceClassification.from_pretrained(folder / "exported")
    assert type(exported) is type(tiny_model("bert"))
    final = load_file(folder / "final.safetensors")
    assert all(torch.equal(tensor, final[name]) for name, tensor in exported.state_dict().items())
    assert "continuing after step 8" in launched(1, tmp_path / "on one")  # a checkpoint of FSDP is any other's
    assert_close(tmp_path / "on one", one)


@pytest.mark.parametrize("kind", ["fsdp-second", "ddp-second"])
def test_a_second_training_in_the_same_processes_is_one_of_its_own(one, tmp_path, kind):
    launched(2, tmp_path / "run", kind)
    assert_close(tmp_path / "run", one)


def test_fsdp2_saves_shards_that_are_checked_and_resumed_by_two_processes_and_by_one(one, tmp_path):
    folder = tmp_path / "run"
    launched(2, folder, "fsdp-sharded", "8:0", codes=[75, 75])
    older, newest = sorted((folder / "checkpoints").glob("step-*"))[-2:]
    assert newest.name == "step-00000008" and fault_of(newest) is None
    names = {file.name for file in newest.iterdir()} - {"MANIFEST.json", "state.json", "skip_rule.safetensors"}
    parts = ("model", "optimizer", "ema")
    assert names == {f"{part}-0000{rank}-of-00002.safetensors" for part in parts for rank in (0, 1)}
    sizes = {name: (newest / name).stat().st_size for name in names}
    for part in parts:
        both = [sizes[f"{part}-0000{rank}-of-00002.safetensors"] for rank in (0, 1)]
        assert max(both) < 0.55 * sum(both)
    assert fault_when(newest, lambda file: file.unlink())
    assert fault_when(newest, lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\xa5"))
    assert fault_when(newest, lambda file: shutil.copy(older / file.name, file))
    assert fault_when(newest, lambda file: shutil.copy(newest / file.name.replace("-00001-", "-00000-"), file))
    for name, processes, kind in (("on one", 1, "ddp"), ("whole", 2, "fsdp")):
        shutil.copytree(folder, tmp_path / name)
        assert "continuing after step 8" in launched(processes, tmp_path / name, kind)
        assert_close(tmp_path / name, one)
        assert (tmp_path / name / "checkpoints/step-00000012/model.safetensors").exists()
    assert "continuing after step 8" in launched(2, folder, "fsdp-sharded")
    assert_close(folder, one)


def fault_when(checkpoint, damage):
    """Tell whether damage to one rank's weights is found; they are put back."""
    file = checkpoint / "model-00001-of-00002.safetensors"
    content = file.read_bytes()
    damage(file)
    fault = fault_of(checkpoint)
    file.write_bytes(content)
    assert fault_of(checkpoint) is None
    return fault is not None and file.name in fault


def test_a_whole_checkpoint_is_continued_in_shards(one, tmp_path):
    launched(1, tmp_path, "ddp", "8:0", codes=[75])
    assert "continuing after step 8" in launched(2, tmp_path, "fsdp-sharded")
    assert_close(tmp_path, one)


def test_a_process_that_is_killed_while_shards_are_written_leaves_intact_checkpoints(one, tmp_path):
    launched(2, tmp_path, "fsdp-sharded", "0:0", "die", codes=[1, -9])
    published = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert len(published) >= 2 and not any(fault_of(checkpoint) for checkpoint in published)
    assert "continuing after step" in launched(2, tmp_path, "fsdp-sharded")
    assert_close(tmp_path, one)
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_a_process_that_cannot_write_its_shards_ends_the_run_on_all(tmp_path):
    said = launched(2, tmp_path, "fsdp-sharded", "0:0", "quota", codes=[1, 1])
    assert said.count("a checkpoint cannot be written: ") == 2 and "there is no checkpoint yet" in said
    assert not list((tmp_path / "checkpoints").iterdir())


def test_masks_under_fsdp2_are_those_of_one_process_and_are_resumed(tmp_path):
    launched(1, tmp_path / "one", "ddp-masks")
    launched(2, tmp_path / "two", "fsdp-sharded-masks", "4:0", codes=[75, 75])
    (newest,) = sorted((tmp_path / "two/checkpoints").glob("step-*"))[-1:]
    assert newest.name == "step-00000004" and len(list(newest.glob("masks-0000?-of-00002.safetensors"))) == 2
    shutil.copytree(tmp_path / "two", tmp_path / "on one")
    assert "continuing after step 4" in launched(2, tmp_path / "two", "fsdp-masks")  # masks are chosen up to step 6
    assert "continuing after step 4" in launched(1, tmp_path / "on one", "ddp-masks")
    zeros = load_file(tmp_path / "one/zeros.safetensors")
    assert zeros and all(zero.any() for zero in zeros.values())
    for folder in (tmp_path / "two", tmp_path / "on one"):
        assert_close(folder, tmp_path / "one")
        found = load_file(folder / "zeros.safetensors")
        assert found.keys() == zeros.keys() and all(torch.equal(zero, zeros[name]) for name, zero in found.items())
        assert sparsities(folder) == pytest.approx(sparsities(tmp_path / "one"))


def sparsities(folder):
    return [record["sparsity"] for record in read_records(folder / "metrics.jsonl") if record["event"] == "train"]


def test_projections_under_fsdp2_are_trained_and_resumed_as_by_one_process(tmp_path):
    launched(1, tmp_path / "one", "ddp-wide")
    launched(2, tmp_path / "two", "fsdp-wide", "8:0", codes=[75, 75])
    assert "continuing after step 8" in launched(2, tmp_path / "two", "fsdp-sharded-wide")
    assert_close(tmp_path / "two", tmp_path / "one")
    last, wanted = (
        read(sorted((tmp_path / name / "checkpoints").glob("step-*"))[-1])["model"] for name in ("two", "one")
    )
    projections = [name for name in wanted if name.startswith("projections.")]
    assert projections
    for name in projections:
        torch.testing.assert_close(last[name], wanted[name], rtol=0, atol=1e-5, msg=name)


def test_a_language_model_under_fsdp2_whose_head_is_read_in_chunks(tmp_path):
    launched(1, tmp_path / "one", "ddp-lm")
    launched(2, tmp_path / "two", "fsdp-lm")
    assert_close(tmp_path / "two", tmp_path / "one")


@pytest.fixture(scope="module")
def one_compiled(tmp_path_factory):
    """One process from beginning to end, with compiled layers."""
    folder = tmp_path_factory.mktemp("compiled") / "run"
    assert "layers are compiled" in launched(1, folder, "ddp-compiled-wide")
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_compiled_layers_of_several_processes_are_those_of_one(kind, one_compiled, tmp_path):
    said = launched(2, tmp_path / "run", f"{kind}-compiled-wide")
    assert "layers are compiled" in said and "cannot be compiled" not in said
    assert_close(tmp_path / "run", one_compiled)


def test_a_compiler_that_fails_on_one_process_is_done_without_on_both(one_compiled, tmp_path):
    said = launched(2, tmp_path / "run", "ddp-compiled-wide", "0:0", "compiler")
    assert "the layers run as they are, they cannot be compiled: another rank failed" in said
    assert_close(tmp_path / "run", one_compiled)


def test_a_gradient_that_is_no_number_on_one_process_leaves_out_the_step_on_both(tmp_path):
    launched(2, tmp_path, "ddp", "0:0", "nan")
    records = [record for record in read_records(tmp_path / "metrics.jsonl") if record["event"] == "train"]
    assert [record["skipped"] for record in records] == [0] * 2 + [1] * (STEPS - 2)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "final.safetensors").values())


def test_out_of_memory_on_one_of_two_processes_is_halved_by_the_next_start(one, tmp_path):
    folder = tmp_path / "run"
    assert "give the same command again; it halves them" in launched(2, folder, "ddp", "0:0", "oom", codes=[1, 1])
    launched(2, folder)
    state = sorted((folder / "checkpoints").glob("step-*"))[-1] / "state.json"
    assert '"micro_batch_halvings": 1' in state.read_text()

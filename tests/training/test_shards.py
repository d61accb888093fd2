"""Checkpoints of which each process writes its part: every number is kept once, and read by whom it concerns."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from forked import Processes
from running import MADE_FROM, save
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from distill.errors import RunError
from distill.ranks import process_state
from distill.training import shards
from distill.training.checkpoint import Checkpoints, TrainState, fault_of, state_of
from distill.training.shards import read
from distill.training.writer import CheckpointWriter

torch.manual_seed(0)  # the same in every process that imports this
SHAPES = {"even": (4, 3), "uneven": (5, 2), "one row": (1, 7), "vector": (3,)}
PARAMETERS = {name: torch.randn(shape) for name, shape in SHAPES.items()}


def write_as_one_of_two(folder):
    rank = process_state().process_index
    flat, grid = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))

    def spread(mesh, *placements):
        return {name: distribute_tensor(tensor, mesh, placements) for name, tensor in PARAMETERS.items()}

    rows, replicas = spread(flat, Shard(0)), spread(grid, Replicate(), Shard(0))
    columns = spread(flat, Shard(-1))
    for name, model in (("rows", rows), ("replicas", replicas)):
        parts = {"model": {**model, "buffer": torch.tensor(7)}, "skip_rule": {"skipped": torch.tensor([1, 2])}}
        saved = save(Checkpoints(folder / name, MADE_FROM, print), TrainState(step=3), parts)
        for other in (rows, replicas, columns):
            found = read(saved, lambda part, key, other=other: other.get(key))["model"]
            for key, tensor in other.items():
                assert found[key].placements == tensor.placements
                assert torch.equal(found[key].to_local(), tensor.to_local()), (name, key)
            assert found["buffer"].item() == 7

    publish_without_the_main_threads(folder / "slow", rows, rank)
    broken = {**rows, "even": distribute_tensor(PARAMETERS["even"].clone(), flat, [Shard(0)])}
    if rank == 1:
        broken["even"].to_local().fill_(float("nan"))
    try:
        save(Checkpoints(folder / "broken", MADE_FROM, print), TrainState(step=1), {"model": broken})
    except RunError as error:
        (folder / f"refused-{rank}").write_text(str(error))


def publish_without_the_main_threads(folder, rows, rank):
    """One rank is slower than the other, and neither main thread takes part in anything after the copy."""
    checkpoints = Checkpoints(folder, MADE_FROM, print)
    writer = CheckpointWriter(checkpoints, print)
    if rank == 1:
        shards.save_file = lambda *given, **named: (time.sleep(0.5), save_file(*given, **named))
    writer.save([checkpoints], TrainState(step=3), {"model": rows}, whole=False)
    while not checkpoints.published():
        time.sleep(0.01)
    writer.settle()
    shards.save_file = save_file


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The checkpoints that two ranks have written."""
    folder = tmp_path_factory.mktemp("made")
    started = Processes(folder / "log", write_as_one_of_two, folder, ranks=2)
    assert started.wait() == [0, 0], started.said
    return folder


@pytest.mark.parametrize("name", ["rows", "replicas"])
def test_one_process_reads_the_whole_of_what_two_have_written(made, name):
    saved = made / name / "step-00000003"
    assert fault_of(saved) is None
    state, parts = state_of(saved), read(saved)
    assert state == TrainState(step=3) and parts["skip_rule"]["skipped"].tolist() == [1, 2]
    assert parts["model"].pop("buffer").item() == 7 and parts["model"].keys() == PARAMETERS.keys()
    assert all(torch.equal(tensor, PARAMETERS[key]) for key, tensor in parts["model"].items())


def test_what_the_slower_process_has_written_is_published_without_the_main_threads(made):
    assert fault_of(made / "slow/step-00000003") is None and len(list((made / "slow/step-00000003").iterdir())) == 4


def test_each_number_is_written_once(made):
    first, second = (load_file(made / f"rows/step-00000003/model-0000{rank}-of-00002.safetensors") for rank in (0, 1))
    assert [len(first[name]) for name in SHAPES] == [2, 3, 1, 2] and [len(second[name]) for name in SHAPES] == [
        2,
        2,
        0,
        1,
    ]
    assert "buffer" in first and "buffer" not in second
    assert load_file(made / "replicas/step-00000003/model-00001-of-00002.safetensors") == {}
    with safe_open(made / "rows/step-00000003/model-00001-of-00002.safetensors", "pt") as file:
        assert json.loads(file.metadata()["pieces"])["uneven"] == [[5, 2], [3, 0]]


def test_weights_that_are_not_finite_on_one_process_are_refused_on_all(made):
    for rank in (0, 1):
        assert "weights are not finite (even): not saved; there is no" in (made / f"refused-{rank}").read_text()
    assert list((made / "broken").iterdir()) == []


def test_a_missing_file_is_noticed_also_where_the_manifest_does_not_know_it(made, tmp_path):
    saved = shutil.copytree(made / "rows/step-00000003", tmp_path / "step-00000003")
    (saved / "model-00000-of-00002.safetensors").unlink()
    sums = json.loads((saved / "MANIFEST.json").read_text())
    assert "model-00000-of-00002" in fault_of(saved)
    del sums["model-00000-of-00002.safetensors"]
    (saved / "MANIFEST.json").write_text(json.dumps(sums))
    assert fault_of(saved) == "its manifest is incomplete"
    with pytest.raises(RunError, match=r"pieces of .* are missing"):
        read(saved, lambda _part, _name: None)


def test_files_of_two_processes_swapped_with_each_other_are_noticed(made, tmp_path):
    saved = shutil.copytree(made / "rows/step-00000003", tmp_path / "step-00000003")
    one, two = (saved / f"model-0000{rank}-of-00002.safetensors" for rank in (0, 1))
    content = one.read_bytes()
    shutil.copy(two, one)
    two.write_bytes(content)
    assert "does not match its checksum" in fault_of(saved)


def test_shards_give_way_to_newer_ones_like_any_checkpoint(made, tmp_path):
    shutil.copytree(made / "rows", tmp_path / "checkpoints")
    shelf = Checkpoints(tmp_path / "checkpoints", MADE_FROM, print)
    assert shelf.newest_valid() == tmp_path / "checkpoints/step-00000003"
    for step in (4, 5):
        save(shelf, TrainState(step=step), {"model": {"w": torch.zeros(1)}})
    assert [path.name for path in shelf.published()] == ["step-00000004", "step-00000005"]

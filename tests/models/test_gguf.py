"""GGUF teachers: a tiny quantised file, made as llama.cpp makes it, becomes a folder like any other."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from quantised import WIDE, write_gguf
from tiny import LAYERS, tiny_batch, tiny_project

from distill.cli import main
from distill.errors import InputError, RecipeError
from distill.models.load import ModelHead, load_model, load_tokenizer, teacher_path
from distill.recipe import load_recipe
from distill.recipe.gguf import gguf_size
from distill.recipe.locate import TeacherSize
from distill.recipe.schema import Teacher

RECIPE = """\
name: tiny
teacher: {model: ./teacher.gguf}
student:
  layers: {keep: 2, choose: even}
  mlp: {keep: 0.5, multiple_of: 8}
  calibration: {examples: 8, batch_size: 8}
data: {source: ./data.jsonl, task: causal_lm, max_length: 16}
losses:
  - {match: logits}
training: {steps: 2, batch_size: 8, lr: 1e-3}
evaluation: {batch_size: 16, efficiency: false, arms: [teacher, cut, distilled]}
release: {license: apache-2.0}
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_file_becomes_a_folder_with_the_dequantised_weights(tmp_path):
    model, said = write_gguf(tmp_path / "x.gguf"), []
    folder = teacher_path(Teacher(model="./x.gguf"), tmp_path, say=said.append)
    loaded = load_model(folder, ModelHead("AutoModelForCausalLM"))
    with torch.no_grad():
        assert torch.equal(loaded(**tiny_batch()).logits, model(**tiny_batch()).logits)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    tokenizer = load_tokenizer(folder)
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.model_max_length) == (64, 2, 64)
    assert teacher_path(Teacher(model="./x.gguf"), tmp_path, say=said.append) == folder
    assert len(said) == 1
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_header_tells_the_sizes(tmp_path):
    write_gguf(tmp_path / "x.gguf")
    assert gguf_size(tmp_path / "x.gguf") == TeacherSize(LAYERS, WIDE, 64, family="llama", vocabulary=64)


def test_a_file_is_pinned_by_its_checksum(tmp_path):
    write_gguf(tmp_path / "x.gguf")
    with pytest.raises(InputError, match=r"teacher.sha256: ./x.gguf has [0-9a-f]{64}, not aaaa"):
        teacher_path(Teacher(model="./x.gguf", sha256="a" * 64), tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content[:-2000], "cannot dequantise"),
        (lambda content: content[:100], "broken or was not copied whole"),
        (lambda content: b"GGML" + content[4:], "is not a GGUF file"),
        (lambda content: content[:4] + b"\x09\0\0\0" + content[8:], "version 9; 2 and 3 are read"),
        (lambda content: content[:16] + b"\xff" * 8 + content[24:], "is a GGUF file of version 3"),
    ],
)
def test_a_broken_file_is_refused(change, words, tmp_path):
    path = tmp_path / "x.gguf"
    write_gguf(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=words):
        teacher_path(Teacher(model="./x.gguf"), tmp_path)


def test_what_cannot_be_a_teacher_is_refused(tmp_path, monkeypatch):
    write_gguf(tmp_path / "part.gguf", **{"split.count": 3})
    with pytest.raises(InputError, match="one of 3 parts"):
        gguf_size(tmp_path / "part.gguf")
    write_gguf(tmp_path / "small.gguf", vocab_size=60)
    with pytest.raises(InputError, match="the tokenizer has 64 tokens, the model 60 embeddings"):
        gguf_size(tmp_path / "small.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    write_gguf(tmp_path / "x.gguf")
    with pytest.raises(InputError, match=r"pip install 'distill\[gguf\]'"):
        gguf_size(tmp_path / "x.gguf")


def test_a_recipe_names_a_file_and_is_checked_against_it(tmp_path):
    recipe = tiny_project(tmp_path, RECIPE)
    with pytest.raises(RecipeError, match=r"there is no file .*teacher.gguf"):
        load_recipe(recipe)
    write_gguf(tmp_path / "teacher.gguf")
    load_recipe(recipe)
    with pytest.raises(RecipeError, match="the teacher has 4"):
        load_recipe(recipe, ["student.layers.keep=5"])


def test_a_run_from_a_file_says_on_the_card_that_the_teacher_was_quantised(tmp_path, capsys):
    recipe = tiny_project(tmp_path, RECIPE)
    texts = [f"{'red cat! '[i % 3 :]}{i}" for i in range(150)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text.replace(" ", "!")}) + "\n" for text in texts))
    write_gguf(tmp_path / "teacher.gguf")
    assert main(["run", str(recipe), "--out", str(tmp_path / "run")]) == 0
    assert "dequantising teacher.gguf once" in capsys.readouterr().err
    assert "quantised GGUF file" in (tmp_path / "run/release/README.md").read_text()

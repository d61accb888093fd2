"""The longest sequence that a model can read, told from its config and tried on the model."""

from __future__ import annotations

import shutil

import huggingface_hub.constants
import pytest
import torch
from tiny import SEQ2SEQ_SIZES, SIZES, tiny_batch, tiny_project
from transformers import AutoConfig, AutoModel

from distill.cli import main
from distill.errors import RecipeError
from distill.models.load import load_tokenizer
from distill.recipe import load_recipe
from distill.recipe.locate import RESERVED_POSITIONS, teacher_size

PLAIN = ("bert", "gpt2", "opt", "bart")
OWN_SIZES = {"bart": SEQ2SEQ_SIZES, "longformer": {"attention_window": 4}, "opt": {"word_embed_proj_dim": 32}}
NEEDS_MORE = {
    "xmod": "a language",
    "lilt": "boxes",
    "layoutlmv3": "boxes",
    "esm": "a list of amino acids",
    "prophetnet": "sizes of its own",
}
"""Families of which a tiny model takes more than token ids and the common sizes."""


@pytest.mark.parametrize("family", [*PLAIN, *(name for name in RESERVED_POSITIONS if name not in NEEDS_MORE)])
def test_a_model_reads_as_many_tokens_as_its_config_is_taken_to_say(family, tmp_path):
    sizes = {**SIZES, **OWN_SIZES.get(family, {}), "num_hidden_layers": 2, "pad_token_id": 3, "hidden_size": 32}
    if family == "mpnet":
        sizes["pad_token_id"] = 1  # it reserves two rows, whatever the config says
    config = AutoConfig.for_model(family, **{**sizes, "max_position_embeddings": 24, "n_positions": 24})
    config.save_pretrained(tmp_path)
    positions = teacher_size(tmp_path).positions
    model = AutoModel.from_config(config).eval()
    assert positions == (24 if family in PLAIN else 23 - sizes["pad_token_id"])

    def run(length):
        ids = tiny_batch(rows=1, length=length, padded=False)["input_ids"].clamp(min=4)
        with torch.no_grad():
            model(input_ids=ids)

    run(positions)
    with pytest.raises((IndexError, RuntimeError)):
        run(positions + 1)


def roberta_project(folder, length):
    recipe = tiny_project(folder, family="roberta")
    text = recipe.read_text().replace("max_length: 16", f"max_length: {length}")
    recipe.write_text(text)
    config = AutoConfig.from_pretrained(folder / "teacher")
    config.update({"max_position_embeddings": 34, "pad_token_id": 1})
    config.save_pretrained(folder / "teacher")
    return recipe


@pytest.mark.parametrize("length", [33, 34, 35])
def test_a_length_that_includes_reserved_positions_is_refused(length, tmp_path):
    with pytest.raises(RecipeError, match=r"has 32 positions") as caught:
        load_recipe(roberta_project(tmp_path, length))
    (problem,) = caught.value.problems
    assert (problem.key, problem.fix) == ("data.max_length", "use at most 32")


def test_the_length_without_reserved_positions_is_accepted(tmp_path):
    load_recipe(roberta_project(tmp_path, 32))


def test_a_teacher_from_the_hub_is_looked_at_before_the_first_stage(tmp_path, monkeypatch, capsys):
    recipe = roberta_project(tmp_path, 34)
    recipe.write_text(recipe.read_text().replace("model: ./teacher", "model: org/tiny"))
    repository = tmp_path / "hub/models--org--tiny"
    shutil.copytree(tmp_path / "teacher", repository / "snapshots/abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["plan", str(recipe), "--out", str(tmp_path / "run")]) == 2
    assert "data.max_length: 34 tokens per example, the teacher has 32 positions" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_a_length_gets_that_of_the_model(tmp_path):
    roberta_project(tmp_path, 32)
    path = tmp_path / "teacher/tokenizer_config.json"
    assert load_tokenizer(tmp_path / "teacher").model_max_length == 64  # it says so itself
    path.write_text(path.read_text().replace('"model_max_length": 64', '"model_max_length": 1000000000000000019884624'))
    tokenizer = load_tokenizer(tmp_path / "teacher")
    assert tokenizer.model_max_length == 32
    assert len(tokenizer("red " * 50, truncation=True)["input_ids"]) == 32

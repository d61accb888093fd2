"""GGUF teachers: a tiny quantised file, made as llama.cpp makes it, becomes a folder like any other."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from tiny import LAYERS, tiny_batch, tiny_model, tiny_project

from distill.cli import main
from distill.errors import InputError, RecipeError
from distill.models.load import ModelHead, load_model, load_tokenizer, teacher_path
from distill.recipe import load_recipe
from distill.recipe.gguf import gguf_size
from distill.recipe.locate import TeacherSize
from distill.recipe.schema import Teacher

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WIDE = 64
"""Blocks of Q8_0 are 32 wide."""
TOKENS = ["<unk>", "<s>", "</s>", *(chr(33 + i) for i in range(59)), "!!", "##"]
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


def rope_order(weight, heads):
    """Turn halves of each head into pairs, as llama.cpp keeps queries and keys."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, **other):
    """Write a tiny Llama, matrices in 8 bits; returns the model that the file stands for."""
    model = tiny_model("llama", intermediate_size=WIDE)
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {"block_count": LAYERS, "context_length": 64, "embedding_length": 32, "feed_forward_length": WIDE}
    for name, value in {**numbers, "vocab_size": 64, "rope.dimension_count": 8, **other}.items():
        writer.add_uint32(name if "." in name and not name.startswith("rope") else f"llama.{name}", value)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * 61)
    writer.add_token_merges(["! !", "# #"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    state = model.state_dict()
    for name, tensor in state.items():
        top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        index, _, inner = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
        own = f"blk.{index}.{NAMES[inner]}" if inner in NAMES else top[name.removesuffix(".weight")]
        weight = tensor.numpy()
        if weight.ndim == 1:
            writer.add_tensor(f"{own}.weight", weight)
            continue
        stored = quantize(weight, GGMLQuantizationType.Q8_0)
        tensor.copy_(torch.from_numpy(dequantize(stored, GGMLQuantizationType.Q8_0)))
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(inner)
        if heads:
            stored = quantize(np.ascontiguousarray(rope_order(weight, heads)), GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{own}.weight", stored, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


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

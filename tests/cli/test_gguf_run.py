"""A chat model from its files to a release with GGUF beside it, through the command line."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys

import gguf
import pytest
from llama_tokenizer import save_pieces
from tiny import CLASSES, WORDS, tiny_config, tiny_project
from transformers import AutoTokenizer

from distill.cli import main

RECIPE = """\
name: tiny
teacher: {model: ./teacher, init: random, fit: {steps: 8, batch_size: 8, lr: 3e-3}}
student: {layers: {keep: 2, choose: every}, mlp: {keep: [64, 32], multiple_of: 32}, calibration: {examples: 16}}
data: {source: ./data.jsonl, task: chat, max_length: 48}
losses: [{match: logits}]
training: {steps: 8, batch_size: 8, lr: 3e-3}
evaluation: {batch_size: 16, arms: [teacher, distilled], efficiency: false}
release: {license: apache-2.0, format: padded, also: [gguf]}
"""


def chat_project(folder):
    (folder / "teacher").mkdir()
    save_pieces(folder / "teacher")
    tokens = AutoTokenizer.from_pretrained(folder / "teacher")
    ends = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id, "pad_token_id": 0}
    tiny_config("llama", vocab_size=len(tokens), intermediate_size=96, **ends).save_pretrained(folder / "teacher")
    chooser = random.Random(0)
    asked = [(" ".join(chooser.choices(WORDS, k=4)), chooser.choice([*CLASSES.values()])) for _ in range(120)]
    rows = [[{"role": "user", "content": ask}, {"role": "assistant", "content": said}] for ask, said in asked]
    (folder / "data.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


@pytest.mark.slow
def test_a_chat_model_of_different_widths_is_released_for_llama_cpp_too(tmp_path, monkeypatch, capsys):
    recipe, run = chat_project(tmp_path), tmp_path / "run"
    assert main(["run", str(recipe), "--out", str(run), "--accept-weak-teacher"]) == 0
    forms = json.loads((run / "release/evaluation.json").read_text())["forms"]
    assert list(forms) == ["GGUF, fp32", "GGUF, Q8_0"]
    assert 0 < forms["GGUF, fp32"]["difference"] < 1e-4 < forms["GGUF, Q8_0"]["difference"]
    fields = gguf.GGUFReader(run / "release/gguf/model-F32.gguf").fields
    template = (run / "release/chat_template.jinja").read_text()
    assert fields["tokenizer.chat_template"].contents() == template
    end = fields["tokenizer.ggml.eos_token_id"].contents()
    assert AutoTokenizer.from_pretrained(run / "release").convert_ids_to_tokens(end) == "<|im_end|>"
    assert fields["llama.feed_forward_length"].contents() == 64
    assert "  gguf/model-Q8_0.gguf\n" in (run / "release/SHA256SUMS").read_text()
    card = (run / "release/README.md").read_text()
    assert "| GGUF, Q8_0 | gguf/model-Q8_0.gguf | xllamacpp " in card and "llama-cli -m FILE" in card
    [example] = re.findall(r"```python\n(.*?)```", card.split("### Other forms")[1], re.DOTALL)
    (tmp_path / "tiny").symlink_to(run / "release")
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "example.py"
    script.write_text(example)
    done = subprocess.run([sys.executable, script.name], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip()
    with (run / "release/gguf/model-Q8_0.gguf").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"edit")
    capsys.readouterr()
    assert main(["verify", str(run / "release"), "--data", str(tmp_path)]) == 1
    assert "gguf/model-Q8_0.gguf" in "".join(capsys.readouterr())


def test_a_model_that_llama_cpp_cannot_run_is_refused_before_anything_is_done(tmp_path, capsys):
    recipe = tiny_project(tmp_path)
    assert main(["plan", str(recipe), "--out", str(tmp_path / "run"), "release.also=[gguf]"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "release.also: gguf: of a bert llama.cpp runs AutoModel only, and the task has AutoModelForSequence" in said
    assert not (tmp_path / "run").exists()

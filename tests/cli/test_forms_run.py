"""Whole runs that release other forms, through the command line."""

from __future__ import annotations

import hashlib
import json
import re
import shutil

import pytest
import torch
import transformers
from tiny import tiny_project
from transformers import AutoTokenizer

from distill.cli import main
from distill.errors import RunError
from distill.models.load import ModelHead, load_model
from distill.release.export import check_release, write_release
from distill.release.old_names import add_old_names
from distill.release.oldest_transformers import oldest_version

TWO_KINDS = {
    "full_attention": {"rope_theta": 9.0, "rope_type": "default"},
    "sliding_attention": {"rope_theta": 7.0},
}
FORMS = "release.also=[ctranslate2, int8]"


@pytest.mark.slow
def test_a_run_releases_forms_with_what_8_bits_cost_and_examples_that_work(tmp_path, monkeypatch):
    pytest.importorskip("ctranslate2", reason="pip install 'distill[ctranslate2]'")
    pytest.importorskip("onnxruntime", reason="pip install 'distill[onnx]'")
    recipe, run = tiny_project(tmp_path), tmp_path / "run"
    widths = "student.mlp={keep: [16, 32], multiple_of: 8}"
    assert main(["run", str(recipe), "--out", str(run), widths, "release.format=native", FORMS]) == 0
    forms = json.loads((run / "release/evaluation.json").read_text())["forms"]
    assert list(forms) == ["ONNX, int8", "CTranslate2, fp32", "CTranslate2, int8"]
    for title in ("ONNX, int8", "CTranslate2, int8"):
        test = forms[title]["test"]
        assert test["examples"] == 33 and {"agreement", "kl"} <= test["metrics"].keys() and test["metrics"]["kl"] < 1e-3
        assert abs(test["metrics"]["loss"] - test["student"]["loss"]) < 0.01
    sums = dict(reversed(line.split("  ")) for line in (run / "release/SHA256SUMS").read_text().splitlines())
    written = {str(file.relative_to(run / "release")) for file in (run / "release").rglob("*") if file.is_file()}
    assert written == {*sums, "SHA256SUMS"} and {"onnx/model_int8.onnx", "ctranslate2/model.bin"} <= written
    assert (
        sums["ctranslate2/model.bin"]
        == hashlib.sha256((run / "release/ctranslate2/model.bin").read_bytes()).hexdigest()
    )
    # The limit of a text is that of the training, for whoever tokenizes it.
    for folder in ("", "onnx", "ctranslate2"):
        tokenizer = AutoTokenizer.from_pretrained(run / "release" / folder)
        assert tokenizer.model_max_length == 16 and len(tokenizer("red " * 20, truncation=True).input_ids) == 16
    assert json.loads((run / "release/tokenizer.json").read_text())["truncation"] is None
    card = (run / "release/README.md").read_text()
    assert "| CTranslate2, int8 | ctranslate2 | ctranslate2 " in card
    examples = re.findall(r"```python\n(.*?)```", card.split("### Other forms")[1], re.DOTALL)
    (tmp_path / "tiny").symlink_to(run / "release")
    monkeypatch.chdir(tmp_path)
    for example in examples:
        exec(example, {})
    assert len(examples) == 2 and card.count("\nIt prints:\n\n> ") == 3 and "> \\[(2, 3)\\]" in card


def test_forms_that_the_teacher_cannot_have_are_refused_before_anything_is_done(tmp_path, capsys):
    recipe = tiny_project(tmp_path, family="electra")
    assert main(["plan", str(recipe), "--out", str(tmp_path / "run"), FORMS]) == 2
    assert "release.also: ctranslate2: it is written for bert" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_without_the_network_the_oldest_transformers_is_one_message(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert main(["run", str(tiny_project(tmp_path)), "--out", str(tmp_path / "run"), "--check-oldest"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        f"--check-oldest: pip cannot install transformers=={oldest_version()}, for which it needs the network" in said
    )
    assert not (tmp_path / "run").exists()


@pytest.fixture
def released(tmp_path):
    tiny_project(tmp_path, family="llama")
    head = ModelHead("AutoModelForCausalLM")
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "teacher")
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
    model = transformers.LlamaForCausalLM(config).eval()
    (tmp_path / "release").mkdir()
    write_release(
        tmp_path / "release", model, [AutoTokenizer.from_pretrained(tmp_path / "teacher")], {}, head.auto_class
    )
    return tmp_path / "release", model, head


def test_a_config_says_the_same_under_the_names_of_transformers_4(released):
    folder, model, head = released
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 5e5 and config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = load_model(folder, head)
    assert again.config.rope_parameters == model.config.rope_parameters and again.config.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(folder).backend_tokenizer is not None


@pytest.mark.parametrize(
    ("family", "rope", "old"),
    [
        ("gemma3_text", TWO_KINDS, {"rope_theta": 9.0, "rope_local_base_freq": 7.0, "rope_scaling": None}),
        ("modernbert", TWO_KINDS, {"global_rope_theta": 9.0, "local_rope_theta": 7.0, "rope_scaling": None}),
        ("gpt_neox", {"rope_theta": 9.0, "rope_type": "default", "partial_rotary_factor": 0.5},
         {"rotary_emb_base": 9.0, "rotary_pct": 0.5, "rope_scaling": None}),
    ],
)  # fmt: skip
def test_rotary_positions_get_their_old_names(family, rope, old, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "rope_parameters": rope}))
    add_old_names(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": family, "rope_parameters": rope, **old}


@pytest.mark.slow
def test_the_gate_loads_a_release_with_older_packages_too(released, tmp_path):
    folder, model, _ = released
    older = tmp_path / "older"
    (older / "transformers").mkdir(parents=True)
    (older / "transformers/__init__.py").write_text("raise ImportError('this version cannot read it')\n")
    probe = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(RunError, match=r"the older one cannot load the student: .*this version cannot read it"):
        check_release(folder, model, "AutoModelForCausalLM", probe, older=older)
    shutil.rmtree(older / "transformers")
    check_release(folder, model, "AutoModelForCausalLM", probe, older=older)

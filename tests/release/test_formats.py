from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers
from tiny import DECODERS, ENCODERS, PREDICTION_KINDS, cut_by_hand, generate, tiny_inputs, tiny_model, tiny_project
from transformers import AutoConfig, AutoModel, AutoTokenizer, dynamic_module_utils

from distill import load_student
from distill.errors import InputError, RunError
from distill.models.family import use_eager_attention
from distill.models.mlp import mlps_of
from distill.models.widths import pad_to_largest
from distill.release.export import check_padding, check_release, write_release
from distill.release.formats import MODELLING_FILE, format_of, write_modelling


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_project(folder)
    return AutoTokenizer.from_pretrained(folder / "teacher")


@pytest.fixture
def modules(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers adds the folder


def student_of(family, **changes):
    return cut_by_hand(tiny_model(family, **changes), (0, 1, 2), (40, 16, 24))


def logits(model):
    with torch.no_grad():
        return model(**tiny_inputs(model))[0]


@pytest.mark.parametrize("family", DECODERS + ENCODERS)
def test_the_modelling_file_is_all_that_stock_loaders_need(family, tmp_path, modules):
    student = student_of(family)
    folder = tmp_path / "native"
    student.save_pretrained(folder)
    write_modelling(folder, student, PREDICTION_KINDS[family])
    auto = getattr(transformers, PREDICTION_KINDS[family])
    for loader in (auto, AutoModel):
        with pytest.raises(RuntimeError, match="per-layer attribute"):
            loader.from_pretrained(folder, ignore_mismatched_sizes=True)
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values())
    assert type(model).__name__ == type(student).__name__ and str(model) == str(student)
    assert torch.equal(logits(model), logits(student))
    bare, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] & {name for name, _ in student.base_model.named_parameters()}
    batch = tiny_inputs(student)
    with torch.no_grad():
        assert torch.equal(bare.eval()(**batch)[0], student.base_model(**batch)[0])
    model.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors", MODELLING_FILE):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert torch.equal(logits(load_student(tmp_path / "again")), logits(student))
    if model._can_set_attn_implementation():
        use_eager_attention(model)
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"eager"}
    if family in DECODERS:
        assert torch.equal(generate(model), generate(model, use_cache=False))


def test_servers_build_the_bare_model_from_its_config(tmp_path, modules):
    student = student_of("llama")
    student.save_pretrained(tmp_path / "native")
    write_modelling(tmp_path / "native", student, "AutoModelForCausalLM")
    model = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path / "native"), trust_remote_code=True)
    assert [mlp.width for mlp in mlps_of(model)] == [40, 16, 24]
    assert all(0.001 < mlp.weight_out.std() < 1 for mlp in mlps_of(model))


def test_equal_widths_are_uniform_whatever_was_asked():
    student = cut_by_hand(tiny_model("bert"), (0, 2), (24, 24))
    assert {format_of(student, form) for form in ("uniform", "native", "padded")} == {"uniform"}


@pytest.mark.parametrize(
    ("family", "asked", "words"),
    [
        ("bert", "uniform", r"release\.format.*different widths.*native.*padded"),
        ("bart", "uniform", r"release\.format.*different widths"),
        ("bart", "native", r"release\.format.*two stacks.*padded"),
        ("t5", "native", r"release\.format.*two stacks.*padded"),
    ],
)
def test_a_format_that_cannot_hold_the_student_is_refused(family, asked, words):
    with pytest.raises(InputError, match=words):
        format_of(student_of(family), asked)


def test_padding_that_changes_logits_does_not_pass():
    student = student_of("bert")
    wide = pad_to_largest(student)
    check_padding(student, wide, tiny_inputs(student))
    with torch.no_grad():
        mlps_of(wide)[1].weight_out[:, 30].normal_()  # a neuron of the padding that speaks
        wide.bert.encoder.layer[1].intermediate.dense.bias[30] = 1
    with pytest.raises(RunError, match="zero neurons change the logits"):
        check_padding(student, wide, tiny_inputs(student))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "form"), [("qwen3_moe", "native"), ("t5-gated", "padded"), ("whisper", "padded")])
def test_a_release_passes_its_gate(family, form, tokenizer, tmp_path):
    student = student_of(family)
    written = write_release(tmp_path, student, [tokenizer], {}, PREDICTION_KINDS[family], form)
    check_release(tmp_path, written, PREDICTION_KINDS[family], tiny_inputs(student), form)
    check_padding(student, written, tiny_inputs(student))
    assert (tmp_path / MODELLING_FILE).is_file() == (form == "native")


@pytest.mark.slow
def test_a_native_release_that_loads_without_its_code_does_not_pass(tokenizer, tmp_path):
    student = student_of("bert")
    write_release(tmp_path, student, [tokenizer], {}, PREDICTION_KINDS["bert"], "native")
    config = json.loads((tmp_path / "config.json").read_text())
    config["allow_global_per_layer_attribute_access"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="without its code, AutoModelForSequenceClassification loads it as another"):
        check_release(tmp_path, student, PREDICTION_KINDS["bert"], tiny_inputs(student), "native")

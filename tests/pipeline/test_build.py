"""The stage `build` on the run's own data: what the knife does not know about is found before anything is trained."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny import RECIPE, tiny_batch, tiny_inputs, tiny_model, tiny_project

from distill.cli import main
from distill.errors import InputError
from distill.models.family import layers_of, layout_of
from distill.models.layout import LAYOUTS
from distill.pipeline.build import check_keeps_all, check_kept_layers
from distill.student.draw import exact_plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "qwen3_moe", "t5"])
def test_a_known_family_keeps_its_logits(family, dtype):
    model = tiny_model(family).to(dtype)
    check_keeps_all(model, tiny_inputs(model))


def test_what_no_tensor_holds_is_found():
    model = tiny_model("llama")
    model.model.layers[2].register_forward_hook(lambda _layer, _given, output: output * 1.01)
    with pytest.raises(InputError, match=r"of this llama does not give the teacher's logits .* cannot be cut"):
        check_keeps_all(model, tiny_batch())


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3_moe", "smollm3", "t5", "bart"])
def test_kept_layers_compute_what_they_did_in_the_teacher(family):
    teacher = tiny_model(family)
    plan = exact_plan(teacher, {side: [0, 3] for side in layout_of(teacher).sides})
    check_kept_layers(teacher, plan, tiny_inputs(teacher))


def test_a_layer_that_goes_by_its_index_is_found():
    teacher = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    for layer in layers_of(teacher):  # fresh weights hardly attend to anything
        layer.attn.c_attn.weight.data.mul_(20)
    plan = exact_plan(teacher, {"main": [0, 1]})
    moved = plan.model_copy(update={"layers": [plan.layers[0], plan.layers[1].model_copy(update={"teacher_layer": 3})]})
    with pytest.raises(InputError, match="only the last layers can be dropped"):
        check_kept_layers(teacher, moved, tiny_batch())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.models.family.INDEX_FLAGS", ())  # a rule that nobody knew of
        with pytest.raises(InputError, match=r"has only these layers of this gpt2 .* the teacher's without the others"):
            check_kept_layers(teacher, moved, tiny_batch())


def test_a_layout_that_takes_a_tensor_from_the_wrong_layer_ends_the_run_with_code_2(tmp_path, monkeypatch, capsys):
    row = LAYOUTS["bert"]
    broken = replace(row, main=replace(row.main, first_only=("attention.self.query.weight",)))
    recipe = str(tiny_project(tmp_path, RECIPE.replace("keep: 2", "keep: 4")))
    monkeypatch.setitem(LAYOUTS, "bert", broken)
    assert main(["build", recipe, "--out", str(tmp_path / "run")]) == 2
    assert "a student that keeps every layer and neuron of this bert" in capsys.readouterr().err
    assert not (tmp_path / "run/student").exists()
    assert json.loads((tmp_path / "run/plan.json").read_text())["model_type"] == "bert"


def test_a_form_of_the_release_that_is_asked_for_later_is_tried_before_the_training(tmp_path, capsys):
    recipe, own = str(tiny_project(tmp_path)), ["--out", str(tmp_path / "run")]
    assert main(["build", recipe, *own]) == 0
    assert main(["build", recipe, "release.format=padded", *own]) == 0
    assert "build: runs again (tried.format: uniform → padded)" in capsys.readouterr().err

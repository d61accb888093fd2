"""Who teaches whom: the model that answers during training is the teacher of the recipe, frozen and without dropout."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_project
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import BertModel

from distill.cli import main

ARMS = "evaluation.arms=[teacher, cut, distilled]"


@pytest.fixture
def built(tmp_path):
    """A run up to the student as cut, of a fitted teacher with 4 layers and dropout: (recipe, run folder)."""
    recipe = tiny_project(tmp_path)
    config = tmp_path / "teacher/config.json"
    rates = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    config.write_text(json.dumps(json.loads(config.read_text()) | rates))
    assert main(["build", str(recipe), ARMS, "--out", str(tmp_path / "run")]) == 0
    return recipe, tmp_path / "run"


def test_the_fitted_teacher_answers_every_micro_batch_in_eval_mode_with_its_own_weights(built):
    recipe, run = built
    weights = load_file(run / "teacher/model.safetensors")
    calls = {4: 0, 2: 0}

    def look(module, _inputs):
        if not isinstance(module, BertModel):
            return
        layers = len(module.encoder.layer)
        calls[layers] += 1
        if layers == 4:
            assert not any(part.training for part in module.modules()), "the teacher drops out"
            assert not torch.is_grad_enabled() and not any(p.requires_grad for p in module.parameters())
            assert all(torch.equal(tensor, weights[f"bert.{name}"]) for name, tensor in module.named_parameters())
        elif torch.is_grad_enabled():
            assert all(part.training for part in module.modules()), "the student does not drop out"

    hook = register_module_forward_pre_hook(look)
    try:
        assert main(["train", str(recipe), ARMS, "--out", str(run)]) == 0
    finally:
        hook.remove()
    steps, micro_batches = 12, 2
    assert calls[4] >= steps * micro_batches and calls[2] > steps * micro_batches  # FLOPs are counted, too

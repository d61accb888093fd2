"""Who teaches whom: the model that answers during training is the teacher of the recipe, frozen and without dropout."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, tiny_project
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import BertModel

from distill.cli import main

READY = ["teacher.init=pretrained", "teacher.fit=null", "evaluation.arms=[teacher, cut, distilled]"]


@pytest.fixture
def built(tmp_path):
    """A run up to the student as cut, of a teacher with 4 layers and dropout: (recipe, run folder, its weights)."""
    recipe = tiny_project(tmp_path)
    classes = dict(enumerate(["mammal", "none", "swimmer"]))
    rates = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    teacher = tiny_model("bert", id2label=classes, pad_token_id=0, **rates)
    teacher.save_pretrained(tmp_path / "teacher")
    assert main(["build", str(recipe), *READY, "--out", str(tmp_path / "run")]) == 0
    return recipe, tmp_path / "run", dict(teacher.bert.named_parameters())


def test_the_teacher_answers_every_micro_batch_in_eval_mode_with_its_own_weights(built):
    recipe, run, weights = built
    calls = {4: 0, 2: 0}

    def look(module, _inputs):
        if not isinstance(module, BertModel):
            return
        layers = len(module.encoder.layer)
        calls[layers] += 1
        if layers == 4:
            assert not any(part.training for part in module.modules()), "the teacher drops out"
            assert not torch.is_grad_enabled() and not any(p.requires_grad for p in module.parameters())
            assert all(torch.equal(tensor, weights[name]) for name, tensor in module.named_parameters())
        elif torch.is_grad_enabled():
            assert all(part.training for part in module.modules()), "the student does not drop out"

    hook = register_module_forward_pre_hook(look)
    try:
        assert main(["train", str(recipe), *READY, "--out", str(run)]) == 0
    finally:
        hook.remove()
    steps, micro_batches = 12, 2
    assert calls[4] >= steps * micro_batches and calls[2] > steps * micro_batches  # FLOPs are counted, too

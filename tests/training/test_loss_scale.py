"""The loss scale of fp16 is part of a checkpoint: a continued training goes on with it, not with the first one."""

from __future__ import annotations

import shutil

import pytest
import torch
from running import dropped, published, run
from tiny import tiny_model

from distill.training import loop
from distill.training.checkpoint import state_of
from distill.training.setup import make_accelerator

FIRST = 2.0**8


@pytest.fixture(autouse=True)
def fp16_on_cpu(monkeypatch):
    """Autocast to fp16 with a scaler that grows every second step; Accelerate makes one for a GPU only."""

    def accelerator(*arguments):
        made = make_accelerator(*arguments)
        made.state._shared_state["_mixed_precision"] = "fp16"
        made.native_amp = True
        made.scaler = torch.amp.GradScaler("cpu", init_scale=FIRST, growth_interval=2)
        return made

    monkeypatch.setattr(loop, "make_accelerator", accelerator)
    return accelerator


def scaler_of(folder):
    return state_of(folder).numbers["scaler"]


def overflowing(corpus, when):
    """A model of which the backward passes in `when` overflow; there are two in each step."""
    model = tiny_model("bert", **dropped(0.1), num_labels=len(corpus.classes))
    passes = iter(range(10**6))
    model.classifier.weight.register_hook(lambda grad: grad * float("inf") if next(passes) in when else grad)
    return model


def test_a_checkpoint_has_the_scale_and_the_training_goes_on_with_it(corpus, tmp_path):
    whole, _ = run(corpus, tmp_path / "whole", model=overflowing(corpus, {6}), steps=7)  # an overflow in step 4
    run(corpus, tmp_path / "parts", model=overflowing(corpus, {6}), steps=7)
    saved = published(tmp_path / "parts/checkpoints")
    assert [path.name for path in saved] == ["step-00000006", "step-00000007"]
    # It grows after steps 1 and 2, is at 1 of 2 after step 3, halves in step 4, grows after steps 5 and 6.
    assert scaler_of(saved[0]) == {
        "scale": 2 * FIRST, "_growth_tracker": 0, "growth_factor": 2, "backoff_factor": 0.5, "growth_interval": 2
    }  # fmt: skip
    assert scaler_of(saved[1])["_growth_tracker"] == 1
    shutil.rmtree(saved[1])
    model, said = run(corpus, tmp_path / "parts", model=overflowing(corpus, set()), steps=7)
    assert "continuing after step 6" in said[-1]
    ends = [published(tmp_path / name / "checkpoints")[-1] for name in ("whole", "parts")]
    assert scaler_of(ends[0]) == scaler_of(ends[1])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))


def test_a_checkpoint_without_a_scale_leaves_the_scaler_as_it_is(corpus, tmp_path, monkeypatch, fp16_on_cpu):
    monkeypatch.setattr(loop, "make_accelerator", make_accelerator)
    run(corpus, tmp_path, steps=2)
    (saved,) = published(tmp_path / "checkpoints")
    assert scaler_of(saved) == {}
    monkeypatch.setattr(loop, "make_accelerator", fp16_on_cpu)
    _, said = run(corpus, tmp_path, steps=3)
    assert "continuing after step 2" in said[-1]
    assert scaler_of(published(tmp_path / "checkpoints")[-1])["scale"] == FIRST  # it grows after two steps

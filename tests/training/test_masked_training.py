"""Masks through training: exactly zero after every step, whatever the optimizer, the batches and the restarts do."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch
from forked import Processes
from running import MADE_FROM, dropped, published
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from distill.data import TrainingBatches
from distill.errors import Stopped
from distill.losses import Objective
from distill.ranks import process_state
from distill.recipe.schema import Mask, Term, Training
from distill.student.masks.masks import Masks
from distill.training import Job, read_records, train
from distill.training.checkpoint import Checkpoints
from distill.training.shards import read

STEPS = 8
HARSH = {"weight_decay": 0.5, "betas": (0.95, 0.99), "lr": 3e-3}
"""Much decay and momentum: whatever could bring a masked weight back to life."""
CUBIC = Mask(sparsity=0.6, schedule="cubic", end=0.75, every=2)


def run(corpus, folder, mask, *, micro=4, dropout=0.1, kind=Masks, look=None, **spec):
    """Train a tiny BERT under masks; returns it and them. `look` is called with the model after four steps."""
    often = {"save_every": 2, "log_every": 2, "evaluate_every": 4 if look else 0}
    settings = Training(steps=STEPS, batch_size=8, micro_batch_size=micro, **{**often, **HARSH, **spec})
    model = tiny_model("bert", **dropped(dropout), num_labels=len(corpus.classes))
    made = []

    def constrain(model):
        made.append(kind(model, mask, STEPS))
        return made[0]

    batches = TrainingBatches(corpus, corpus.labelled, 8, micro, 0)
    job = Job("test", settings, folder, 0, MADE_FROM, constrain)
    objective = Objective([Term(match="labels")], "sequence")
    train(job, model, objective, None, batches, evaluate=look, say=lambda _text: None)
    return model, made[0]


def alive(model, masks):
    """Count the masked weights that are not exactly zero."""
    named = dict(model.named_parameters())
    return sum(int((named[name][mask] != 0).sum()) for name, mask in masks.masks.items())


@pytest.mark.parametrize(
    "mask",
    [
        Mask(sparsity=0.5),
        Mask(sparsity=0.5, begin=0.5),  # half-way, when every weight has momentum
        Mask(sparsity=0.5, per="neuron", begin=0.25),
        Mask(threshold=0.5),
        CUBIC,
    ],
    ids=["one_shot", "midway", "neurons", "threshold", "cubic"],
)
def test_masked_weights_are_exactly_zero_after_steps_with_decay_and_momentum(corpus, tmp_path, mask):
    model, masks = run(corpus, tmp_path, mask, micro=2)
    assert masks.masks and alive(model, masks) == 0
    named = dict(model.named_parameters())
    zeros = sum(int((named[name] == 0).sum()) for name in masks.masks)
    assert zeros == sum(int(found.sum()) for found in masks.masks.values())  # and nothing else is


def test_masking_gradients_alone_would_bring_them_back(corpus, tmp_path):
    class GradientsOnly(Masks):
        def apply(self):
            if not getattr(self, "applied", False):
                super().apply()
                self.applied = bool(self.masks)

    model, masks = run(corpus, tmp_path, Mask(sparsity=0.5, begin=0.5), kind=GradientsOnly)
    assert alive(model, masks) > 0.9 * sum(int(mask.sum()) for mask in masks.masks.values())


@pytest.mark.slow
def test_resuming_is_bitwise_the_uninterrupted_run_masks_included(corpus, tmp_path):
    whole, wanted = run(corpus, tmp_path / "whole", CUBIC)
    for kept in (2, 4, 6):  # before, between and after the choices at 0, 2, 4 and 6
        run(corpus, tmp_path / "parts", CUBIC)
        saved = published(tmp_path / "parts/checkpoints")
        for folder in [folder for folder in saved if int(folder.name[5:]) > kept]:
            shutil.rmtree(folder)
        model, masks = run(corpus, tmp_path / "parts", CUBIC)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
        assert masks.masks.keys() == wanted.masks.keys()
        assert all(torch.equal(mask, wanted.masks[name]) for name, mask in masks.masks.items())
        shutil.rmtree(tmp_path / "parts")


def test_the_average_that_is_measured_is_masked_like_the_one_that_is_handed_on(corpus, tmp_path):
    def look(model, _stopped):
        named = dict(model.named_parameters())
        # At step 4 these were masked, and are in the average with what they were before.
        found.append(max(int((named[name][mask] != 0).sum()) for name, mask in seen[0].masks.items()))
        return {"accuracy": 0.5}

    class Seen(Masks):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            seen.append(self)

    found, seen = [], []
    midway = Mask(sparsity=0.5, begin=0.5)
    model, masks = run(corpus, tmp_path, midway, kind=Seen, look=look, ema=0.9, ema_release=True)
    assert found == [0, 0] and alive(model, masks) == 0


def test_a_signal_saves_the_masks_and_the_same_training_continues(corpus, tmp_path):
    whole, _ = run(corpus, tmp_path / "whole", CUBIC)

    def interrupt(_model, _stopped):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(Stopped, match="a checkpoint is saved"):
        run(corpus, tmp_path / "parts", CUBIC, look=interrupt, save_every=0)
    (saved,) = published(tmp_path / "parts/checkpoints")
    assert 4 <= int(saved.name[5:]) < STEPS and "masks" in read(saved)
    model, masks = run(corpus, tmp_path / "parts", CUBIC, save_every=0)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    assert alive(model, masks) == 0


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_checkpoint_whose_masks_are_damaged_is_passed_over(corpus, tmp_path, damage):
    run(corpus, tmp_path, Mask(sparsity=0.5))
    older, newer = published(tmp_path / "checkpoints")
    file = newer / "masks.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage == "flipped":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = Checkpoints(tmp_path / "checkpoints", MADE_FROM, (said := []).append).newest_valid()
    assert found == older and newer.name in said[0]


def test_a_checkpoint_holds_no_masks_before_there_are_any(corpus, tmp_path):
    run(corpus, tmp_path, Mask(sparsity=0.5, begin=1.0), save_every=6)
    before, after = published(tmp_path / "checkpoints")
    assert ["masks" in read(saved) for saved in (before, after)] == [False, True]


def test_accumulation_changes_neither_masks_nor_losses(corpus, tmp_path):
    # The random score does not look at the weights, so that rounding cannot tip a choice.
    mask = Mask(sparsity=0.5, score="random", schedule="cubic", every=2)
    found = {}
    for micro in (8, 2):
        model, masks = run(corpus, tmp_path / str(micro), mask, micro=micro, dropout=0.0)
        losses = [record["loss"] for record in read_records(tmp_path / f"{micro}/metrics.jsonl")]
        found[micro] = masks.masks, losses
        assert alive(model, masks) == 0
    (first, losses), (second, others) = found.values()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert others == pytest.approx(losses, rel=1e-5)


def test_the_log_follows_the_schedule(corpus, tmp_path):
    run(corpus, tmp_path, CUBIC)
    records = read_records(tmp_path / "metrics.jsonl")
    expected = [0.6 * (1 - (2 / 3) ** 3), 0.6 * (1 - (1 / 3) ** 3), 0.6, 0.6]  # t = 1/3, 2/3, 1, healing
    assert [record["sparsity"] for record in records] == pytest.approx(expected, abs=1e-3)


def test_what_cannot_move_does_not_count_when_gradients_are_clipped(corpus, tmp_path):
    norms = {}
    for name, amount in (("none", 1e-6), ("most", 0.95)):
        run(corpus, tmp_path / name, Mask(sparsity=amount, per="weight"), dropout=0.0, only=["*.intermediate.*"])
        norms[name] = read_records(tmp_path / name / "metrics.jsonl")[0]["grad_norm"]
    assert norms["most"] < 0.5 * norms["none"]


def test_frozen_parameters_stay_bit_for_bit_under_decay_and_masks(corpus, tmp_path):
    model, masks = run(
        corpus, tmp_path, Mask(sparsity=0.5), only=["*.encoder.*", "classifier.*"], freeze=["*.layer.1.*"]
    )
    start = tiny_model("bert", num_labels=len(corpus.classes))
    moments = load_file(published(tmp_path / "checkpoints")[-1] / "optimizer.safetensors")
    for (name, after), before in zip(model.named_parameters(), start.parameters(), strict=True):
        learns = (".encoder." in name or name.startswith("classifier.")) and ".layer.1." not in name
        assert torch.equal(after, before) != learns, name
        assert any(moment.startswith(f"student.{name}/") for moment in moments) == learns, name
        assert learns or name not in masks.masks
    assert len(masks.masks) == 2 * 3 and alive(model, masks) == 0


def train_as_one_of_two(corpus, folder):
    model, masks = run(corpus, folder / "run", CUBIC)
    assert alive(model, masks) == 0
    rank = process_state().process_index
    save_file({name: mask.contiguous() for name, mask in masks.masks.items()}, folder / f"masks-{rank}.safetensors")
    if rank == 0:
        model.save_pretrained(folder / "model")


def test_two_processes_have_the_same_masks_and_the_weights_of_one(corpus, tmp_path):
    started = Processes(tmp_path / "log", train_as_one_of_two, corpus, tmp_path, ranks=2)
    assert started.wait() == [0, 0], started.said
    first, second = (load_file(tmp_path / f"masks-{rank}.safetensors") for rank in (0, 1))
    model, masks = run(corpus, tmp_path / "one", CUBIC)
    for name, mask in masks.masks.items():
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], mask), name
    two = load_file(tmp_path / "model/model.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(two[name], parameter.detach(), rtol=0, atol=1e-5)

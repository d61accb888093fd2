from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import LABELS, MADE_FROM, dropped, published, run, save
from safetensors.torch import load_file
from tiny import tiny_model
from torch.nn.modules.module import register_module_forward_pre_hook

from distill.data import TrainingBatches
from distill.errors import InputError, RunError
from distill.losses import Objective
from distill.models.trainable import freeze
from distill.recipe.schema import Training
from distill.training import read_records, setup
from distill.training.checkpoint import Checkpoints, TrainState
from distill.training.model import DistillModel
from distill.training.optim import in_steps, lr_factor, make_optimizer
from distill.training.shards import read
from distill.training.state import load_tensors, own_tensors
from distill.training.tracking import drop_after


def test_the_split_into_micro_batches_does_not_change_the_result(corpus, tmp_path):
    losses = []
    for micro in (8, 4, 2):
        run(corpus, tmp_path / str(micro), micro=micro, dropout=0.0)
        losses.append([record["loss"] for record in read_records(tmp_path / f"{micro}/metrics.jsonl")])
    # Losses, not weights: AdamW turns the rounding noise of a gradient that is 0 (a key bias) into steps of size lr.
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_one_step_is_plain_adamw_on_the_mean_loss(corpus, tmp_path):
    ours, _ = run(corpus, tmp_path, micro=2, steps=1, dropout=0.0, warmup=0, schedule="constant", max_grad_norm=None)
    reference = tiny_model("bert", **dropped(0.0), num_labels=len(corpus.classes)).train()
    optimizer = make_optimizer(reference, Training(steps=1, lr=1e-3))
    batches = TrainingBatches(corpus, corpus.labelled, 8, 8, 0)
    ((_, batch),) = next(batches.stream(0, 1, 0, 1))
    logits = reference(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
    optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), reference.parameters(), strict=True):
        # AdamW's first step is lr * sign(gradient): where a gradient is nearly 0 its sign is rounding noise.
        clear = b.grad.abs() > 1e-6
        torch.testing.assert_close(a[clear], b[clear], rtol=1e-4, atol=1e-6, msg=name)


def test_resuming_from_any_checkpoint_is_bitwise_the_uninterrupted_run(corpus, tmp_path):
    whole, _ = run(corpus, tmp_path / "whole")
    run(corpus, tmp_path / "parts", steps=6)
    shutil.rmtree(published(tmp_path / "parts/checkpoints")[-1])  # as if killed before it was published
    model, said = run(corpus, tmp_path / "parts", steps=6)
    assert "continuing after step 4 of 6" in said[-1]
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]


def test_dropout_of_every_micro_batch_follows_from_seed_step_and_number(corpus, tmp_path):
    model, dropped_at = tiny_model("bert", **dropped(0.1), num_labels=len(corpus.classes)), []
    model.bert.embeddings.dropout.register_forward_hook(lambda _module, _inputs, output: dropped_at.append(output == 0))
    run(corpus, tmp_path, model=model, micro=4, steps=3, seed=7)
    expected = []
    for zeros, (step, number) in zip(dropped_at, [(s, n) for s in range(3) for n in range(2)], strict=True):
        # It is the first to draw in a forward pass.
        torch.manual_seed(int(np.random.SeedSequence((7, step, number)).generate_state(1)[0]))
        expected.append(torch.nn.functional.dropout(torch.ones(zeros.shape), 0.1) == 0)
        assert torch.equal(zeros, expected[-1]), (step, number)
    shared = min(mask.shape[1] for mask in expected)
    masks = [tuple(mask[:, :shared].flatten().tolist()) for mask in expected]
    assert len(set(masks)) == len(masks), "two micro-batches have the same dropout"


def test_rates_progress_and_counters_of_every_step_by_hand(corpus, tmp_path):
    shares = []

    def look(module, inputs):
        if isinstance(module, DistillModel):
            shares.append(inputs[3])

    hook = register_module_forward_pre_hook(look)
    try:
        run(corpus, tmp_path, micro=8, schedule="linear", warmup=2, log_every=1)
    finally:
        hook.remove()
    assert shares == [0, 0.2, 0.4, 0.6, 0.8, 1]  # schedules of losses begin at the first step and end at the last
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["lr"] for record in records] == pytest.approx([5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert [record["epoch"] for record in records] == pytest.approx([step / 3 for step in range(1, 7)], abs=1e-4)
    state = json.loads((published(tmp_path / "checkpoints")[-1] / "state.json").read_text())
    assert (state["step"], state["tokens"]) == (6, records[-1]["tokens"])


def test_projections_and_schedules_resume_exactly_and_are_not_part_of_the_student(corpus, tmp_path):
    wide = tiny_model("bert", seed=1, hidden_size=48, num_labels=len(corpus.classes))
    whole, _ = run(corpus, tmp_path / "whole", wide=wide)
    run(corpus, tmp_path / "parts", wide=wide)
    shutil.rmtree(published(tmp_path / "parts/checkpoints")[-1])
    model, said = run(corpus, tmp_path / "parts", wide=wide)
    assert "continuing after step 4 of 6" in said[-1]
    final = [load_file(published(tmp_path / f"{name}/checkpoints")[-1] / "model.safetensors")
             for name in ("whole", "parts")]  # fmt: skip
    assert final[0].keys() == final[1].keys() and all(torch.equal(final[0][name], final[1][name]) for name in final[0])
    assert not torch.equal(final[0]["projections.1:0.weight"], torch.eye(48, 32))
    assert "projections.3:3.bias" in final[0] and not any("projections" in name for name in model.state_dict())
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_other_inputs_start_from_the_beginning_and_the_message_names_keys_and_option(corpus, tmp_path):
    run(corpus, tmp_path)
    other = {**MADE_FROM, "seed": 1, "training.lr": 0.5}
    assert Checkpoints(tmp_path / "checkpoints", other, (said := []).append).newest_valid() is None
    differing = "(seed: 0 → 1, training.lr: absent → 0.5); --continue-from-changed continues from it"
    assert said[0].endswith(differing)


def test_only_the_newest_two_checkpoints_are_kept_and_half_written_ones_are_swept(corpus, tmp_path):
    (tmp_path / "checkpoints/.tmp-step-00000002").mkdir(parents=True)
    run(corpus, tmp_path, steps=6)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


def test_checkpoints_are_safetensors_and_json_with_tied_tensors_once(tmp_path):
    model = DistillModel(tiny_model("llama", tie_word_embeddings=True), Objective(LABELS, "next_token"))
    folder = save(Checkpoints(tmp_path, MADE_FROM, print), TrainState(step=1), {"model": own_tensors(model)})
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}
    assert not any("lm_head" in name for name in load_file(folder / "model.safetensors"))
    other = DistillModel(tiny_model("llama", seed=5, tie_word_embeddings=True), model.objective)
    load_tensors(other, read(folder)["model"])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_of_another_shape_or_name_are_refused():
    model, other = tiny_model("bert"), own_tensors(tiny_model("bert", num_labels=5))
    with pytest.raises(RunError, match=r"other tensors than the model: classifier\.bias, classifier\.weight"):
        load_tensors(model, other)
    with pytest.raises(RunError, match=r"other tensors than the model: classifier\.bias"):
        load_tensors(model, {name: tensor for name, tensor in own_tensors(model).items() if name != "classifier.bias"})


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_checkpoint(corpus, tmp_path):
    model = tiny_model("bert", num_labels=len(corpus.classes))
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    with pytest.raises(RunError, match=r"last 6 steps .* not finite .*; there is no checkpoint"):
        run(corpus, tmp_path, model=model, save_every=0)


def test_frozen_parameters_do_not_move_and_have_no_optimizer_state(corpus, tmp_path):
    model, _ = run(corpus, tmp_path, freeze=["*.embeddings.*", "*.layer.0.*"])
    start = tiny_model("bert", **dropped(0.1), num_labels=len(corpus.classes))
    for (name, after), before in zip(model.named_parameters(), start.parameters(), strict=True):
        frozen = ".embeddings." in name or ".layer.0." in name
        assert torch.equal(after, before) == frozen, name
    moments = load_file(published(tmp_path / "checkpoints")[-1] / "optimizer.safetensors")
    assert moments and not any(".embeddings." in name or ".layer.0." in name for name in moments)


def test_a_freeze_pattern_that_matches_nothing_or_everything_is_refused():
    with pytest.raises(InputError, match="matches no parameter"):
        freeze(tiny_model("bert"), ["*.embedings.*"])
    with pytest.raises(InputError, match="no parameter that learns"):
        freeze(tiny_model("bert"), ["*"])


def test_norms_and_biases_are_not_decayed():
    model = tiny_model("bert")
    decayed, plain = make_optimizer(model, Training(steps=1, weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim < 2 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


@given(st.integers(1, 500), st.floats(0, 0.9), st.sampled_from(["cosine", "linear", "constant"]))
def test_schedules_rise_to_one_and_stay_in_range(steps, warmup, schedule):
    values = [lr_factor(step, steps, warmup, schedule) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)
    peak = min(in_steps(warmup, steps), steps - 1)
    assert values[max(0, peak - 1)] == pytest.approx(1) or values[peak] == pytest.approx(1)
    assert all(a >= b for a, b in zip(values[peak:], values[peak + 1 :], strict=False))


def test_schedule_values_by_hand():
    assert [lr_factor(step, 10, 2, "linear") for step in (0, 1, 2, 6, 9)] == [0.5, 1.0, 1.0, 0.5, 0.125]
    assert lr_factor(6, 10, 2, "cosine") == pytest.approx(0.5)
    assert lr_factor(9, 10, 2, "cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))


def test_records_after_the_checkpoint_and_half_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"step": 7, "lo')
    drop_after(path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'


@pytest.mark.parametrize(
    ("ranks", "batch", "micro", "dealt"),
    [(1, 8, 2, (2, 4)), (2, 8, 2, (2, 2)), (4, 8, 2, (2, 1)), (1, 8, None, (8, 1)), (2, 8, None, (4, 1))],
)
def test_a_step_is_dealt_out_evenly(ranks, batch, micro, dealt, monkeypatch):
    monkeypatch.setattr(setup, "process_state", lambda: SimpleNamespace(num_processes=ranks))
    assert setup.deal_out(Training(steps=1, batch_size=batch, micro_batch_size=micro)) == dealt


@pytest.mark.parametrize(("ranks", "batch", "micro", "count"), [(2, 6, 2, 3), (2, 7, None, 3), (3, 8, None, 4)])
def test_uneven_shares_are_refused(ranks, batch, micro, count, monkeypatch):
    monkeypatch.setattr(setup, "process_state", lambda: SimpleNamespace(num_processes=ranks))
    with pytest.raises(InputError, match=rf"fit: a step has {count} micro-batches.*{ranks} processes cannot share"):
        setup.deal_out(Training(steps=1, batch_size=batch, micro_batch_size=micro), "teacher.fit")

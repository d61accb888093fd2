"""Nothing is lost and nothing broken goes on: skipped steps, memory, averages, loader workers, disk."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch
from gpus import HANG
from hypothesis import given
from hypothesis import strategies as st
from running import MADE_FROM, dropped, published, run, save
from safetensors.torch import load_file
from tiny import tiny_model

from distill.data import batches
from distill.errors import RunError, Stopped
from distill.losses import Objective
from distill.models.forward import Outputs
from distill.recipe.schema import Term, Training
from distill.training import checkpoint, read_records
from distill.training.checkpoint import TrainState
from distill.training.compiled import CompiledLayers
from distill.training.ema import Ema
from distill.training.setup import make_accelerator, make_learner
from distill.training.skip import WINDOW, SkipRule
from distill.training.step import Step, check_passes


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def poisoned(corpus, where, value=float("nan"), dropout=0.1):
    """A model whose gradient is multiplied by `value` in the backward passes whose numbers are in `where`."""
    model = tiny_model("bert", **dropped(dropout), num_labels=len(corpus.classes))
    passes = iter(range(10**6))
    model.classifier.weight.register_hook(lambda grad: grad * value if next(passes) in where else grad)
    return model


def test_a_gradient_that_is_not_finite_leaves_out_its_step_alone(corpus, tmp_path):
    model = poisoned(corpus, {2}, dropout=0.0)  # of two micro-batches for each step: the second step
    run(corpus, tmp_path, model=model, steps=3, log_every=1, schedule="constant", warmup=0)
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["skipped"] for record in records] == [0, 1, 1]
    assert records[1]["loss"] is None and records[1]["grad_norm"] is None and math.isfinite(records[2]["loss"])
    # AdamW's own clock did not move either: two steps were taken, on the batches of the first and the third.
    moments = load_file(published(tmp_path / "checkpoints")[-1] / "optimizer.safetensors")
    assert {value.item() for name, value in moments.items() if name.endswith("/step")} == {2.0}
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_gradient_spike_is_left_out_and_counted(corpus, tmp_path):
    steps = WINDOW
    run(corpus, tmp_path, model=poisoned(corpus, {2 * steps - 4}, 1e4), steps=steps, log_every=1)
    skipped = [record["skipped"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert skipped == [0] * (steps - 2) + [1, 1]


def test_an_optimizer_that_cannot_decide_by_itself_leaves_out_the_same_step(corpus, tmp_path):
    model, _ = run(
        corpus, tmp_path, model=poisoned(corpus, {2}), steps=3, optimizer="torch.optim:SGD", max_grad_norm=None
    )
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert read_records(tmp_path / "metrics.jsonl")[-1]["skipped"] == 1


def test_too_many_skipped_steps_end_the_run_and_name_the_last_good_checkpoint(corpus, tmp_path):
    model = poisoned(corpus, set(range(8, 100)))
    with pytest.raises(RunError, match=r"last 3 steps up to step 7 .* the last good checkpoint is .*step-00000006"):
        run(corpus, tmp_path, model=model, steps=20, max_skipped=3, log_every=1)


def test_steps_that_are_left_out_at_the_end_are_said(corpus, tmp_path):
    _, said = run(corpus, tmp_path, model=poisoned(corpus, {10, 11}))
    (line,) = [line for line in said if "left out" in line]
    assert line.startswith("test: the last 1 steps up to step 6 were left out") and line.endswith("that of step 5")
    _, said = run(corpus, tmp_path / "whole", model=poisoned(corpus, {6}))
    assert not [line for line in said if "left out" in line]


def test_a_loss_without_a_gradient_for_what_learns_is_said_once(corpus, tmp_path):
    for value, times in ((0.0, 1), (1.0, 0)):
        model = poisoned(corpus, range(100), value)
        _, said = run(corpus, tmp_path / str(value), model=model, only=["classifier.weight"])
        assert sum("no gradient for what learns" in line for line in said) == times


def test_skips_are_the_same_after_a_restart(corpus, tmp_path):
    whole, _ = run(corpus, tmp_path / "whole", model=poisoned(corpus, {4, 9}))
    run(corpus, tmp_path / "parts", model=poisoned(corpus, {4, 9}))
    shutil.rmtree(published(tmp_path / "parts/checkpoints")[-1])
    model, _ = run(corpus, tmp_path / "parts", model=poisoned(corpus, {1}))  # backward pass 9 of the whole run
    assert equal(whole, model)
    assert read_records(tmp_path / "whole/metrics.jsonl")[-1]["skipped"] == 2
    assert read_records(tmp_path / "parts/metrics.jsonl")[-1]["skipped"] == 2


@given(st.lists(st.floats(0.5, 2.0), min_size=WINDOW, max_size=WINDOW), st.floats(5.0, 1e6))
def test_only_a_norm_beyond_the_factor_is_a_spike_and_a_new_level_is_accepted(norms, jump):
    rule, loss = SkipRule(4.0, torch.device("cpu")), torch.tensor(1.0)
    assert not any(rule.should_skip(loss, torch.tensor(norm)).item() for norm in norms)
    judged = [rule.should_skip(loss, torch.tensor(2.0 * jump)).item() for _ in range(WINDOW)]
    half = WINDOW // 2 + 1
    assert judged == [1.0] * half + [0.0] * (WINDOW - half)
    assert rule.skipped.tolist() == [half, 0]


def test_a_factor_of_none_skips_no_finite_norm_and_every_other():
    rule = SkipRule(None, torch.device("cpu"))
    values = [rule.should_skip(torch.tensor(1.0), torch.tensor(norm)).item() for norm in [1.0] * WINDOW + [1e30]]
    assert not any(values)
    assert rule.should_skip(torch.tensor(math.nan), torch.tensor(1.0)).item() == 1
    assert rule.should_skip(torch.tensor(1.0), torch.tensor(math.inf)).item() == 1


def test_steps_in_which_nothing_had_a_gradient_make_no_spike_of_the_others():
    rule = SkipRule(30.0, torch.device("cpu"))
    for _ in range(3 * WINDOW):
        assert rule.should_skip(torch.tensor(0.0), torch.tensor(0.0)).item() == 0
    for _ in range(WINDOW):
        assert rule.should_skip(torch.tensor(1.0), torch.tensor(1.0)).item() == 0
    assert rule.should_skip(torch.tensor(1.0), torch.tensor(31.0)).item() == 1


class SmallMemory:
    """A teacher that runs out of memory with more than so many examples."""

    def __init__(self, most):
        self.most = most

    def __call__(self, batch):
        if len(batch["input_ids"]) > self.most:
            raise torch.OutOfMemoryError(f"{len(batch['input_ids'])} examples")
        return Outputs(torch.zeros(1), {})


def test_out_of_memory_halves_the_micro_batches_and_gives_the_same_result(corpus, tmp_path):
    plain, _ = run(corpus, tmp_path / "plain", micro=8, dropout=0.0)
    halved, said = run(corpus, tmp_path / "halved", micro=8, dropout=0.0, teacher=SmallMemory(2))
    assert [line.startswith("OUT OF MEMORY in step 1") for line in said] == [True, True]
    for name in ("loss", "grad_norm"):
        pairs = [[r[name] for r in read_records(tmp_path / f"{kind}/metrics.jsonl")] for kind in ("plain", "halved")]
        assert pairs[1] == pytest.approx(pairs[0], abs=1e-6)
    for (name, a), b in zip(plain.named_parameters(), halved.parameters(), strict=True):
        if ".key.bias" not in name:  # its true gradient is 0, and AdamW makes steps of size lr of the rounding noise
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


def test_pieces_of_unequal_size_are_halved_down_to_single_examples(corpus, tmp_path):
    plain, _ = run(corpus, tmp_path / "plain", batch_size=6, micro=3, dropout=0.0)
    halved, said = run(corpus, tmp_path / "halved", batch_size=6, micro=3, dropout=0.0, teacher=SmallMemory(1))
    assert [line.split(" up to ")[1].split()[0] for line in said] == ["3", "2"]  # 3 = 2 + 1
    for (name, a), b in zip(plain.named_parameters(), halved.parameters(), strict=True):
        if ".key.bias" not in name:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


class FailsOnce(SmallMemory):
    """A teacher that runs out of memory in one pass."""

    def __call__(self, batch):
        self.most -= 1
        if self.most == 0:
            raise torch.OutOfMemoryError("not enough")
        return Outputs(torch.zeros(1), {})


def test_out_of_memory_in_a_later_micro_batch_leaves_nothing_of_the_earlier_ones_in_the_gradient(corpus, tmp_path):
    run(corpus, tmp_path / "plain", micro=2, dropout=0.0, log_every=1)
    second_of_four = FailsOnce(6)
    _, said = run(corpus, tmp_path / "halved", micro=2, dropout=0.0, log_every=1, teacher=second_of_four)
    assert [line.startswith("OUT OF MEMORY in step 2") for line in said] == [True]
    pairs = [[r["grad_norm"] for r in read_records(tmp_path / f"{kind}/metrics.jsonl")] for kind in ("plain", "halved")]
    assert pairs[1] == pytest.approx(pairs[0], abs=1e-5)


def test_halving_says_where_it_changes_the_loss(tmp_path):
    spec, objective, said = Training(steps=1, batch_size=4, lr=1e-3), Objective([Term(match="labels")], "embedding"), []
    learner = make_learner(tiny_model("bert"), objective, spec, None, make_accelerator(spec, tmp_path))
    step = Step(learner, None, 0, 1, TrainState(), tmp_path, CompiledLayers("test", print), said.append)
    step._halve([(0, {"input_ids": torch.ones(8, 3), "texts": torch.ones(4)})], torch.OutOfMemoryError())
    assert said[0].endswith("halved from here on; each text is compared with fewer others")


def test_ranks_that_would_run_different_numbers_of_passes_are_refused():
    for fits in ((8, 4, 2), (6, 4, 1), (13, 4, 0)):
        check_passes(*fits)
    for uneven in ((13, 4, 1), (6, 4, 2)):  # 2 + 2 + 2 pieces and 1; 4 pieces and 2
        with pytest.raises(RunError, match="as many passes each: make batch_size a multiple of micro_batch_size"):
            check_passes(*uneven)


def test_the_halving_survives_a_restart_bitwise(corpus, tmp_path):
    whole, _ = run(corpus, tmp_path / "whole", micro=8, teacher=SmallMemory(4))
    run(corpus, tmp_path / "parts", micro=8, teacher=SmallMemory(4))
    shutil.rmtree(published(tmp_path / "parts/checkpoints")[-1])
    model, said = run(corpus, tmp_path / "parts", micro=8)  # enough memory by now: the result must not depend on it
    assert len(said) == 1 and "continuing after step 4" in said[0]
    assert equal(whole, model)


def test_halvings_are_forgotten_when_another_micro_batch_size_is_asked_for(corpus, tmp_path):
    run(corpus, tmp_path, micro=8, teacher=SmallMemory(2))  # halved twice, to 2
    newest = published(tmp_path / "checkpoints")[-1]
    state = json.loads((newest / "state.json").read_text())
    assert (state["micro_batch_size"], state["micro_batch_halvings"]) == (8, 2)
    shutil.rmtree(newest)
    sizes = []

    class Seen(SmallMemory):
        def __call__(self, batch):
            sizes.append(len(batch["input_ids"]))
            return super().__call__(batch)

    run(corpus, tmp_path, micro=4, teacher=Seen(4))
    assert sizes == [4, 4] * 2  # two steps of two micro-batches that fit


def test_a_request_for_smaller_micro_batches_holds_for_the_size_that_did_not_fit(corpus, tmp_path):
    (tmp_path / "micro_batches.json").write_text("[8, 1]")
    for micro, halvings in ((4, 0), (8, 1)):
        _, said = run(corpus, tmp_path, micro=micro, steps=2)
        assert any("run in 2 passes (micro_batches.json)" in line for line in said) is bool(halvings)
        state = json.loads((published(tmp_path / "checkpoints")[-1] / "state.json").read_text())
        assert (state["micro_batch_size"], state["micro_batch_halvings"]) == (micro, halvings)
        shutil.rmtree(tmp_path / "checkpoints")


def test_another_micro_batch_size_continues_and_says_what_becomes_of_dropout(corpus, tmp_path):
    run(corpus, tmp_path, micro=4)
    shutil.rmtree(published(tmp_path / "checkpoints")[-1])
    _, said = run(corpus, tmp_path, micro=2)
    assert "continuing after step 4 of 6" in said[0]
    assert said[1:] == ["test: micro_batch_size is 2 and was 4: dropout falls differently from here on"]


def test_a_single_example_that_does_not_fit_ends_the_run(corpus, tmp_path):
    with pytest.raises(RunError, match="single example"):
        run(corpus, tmp_path, teacher=SmallMemory(0))


def test_the_average_follows_its_formula_and_leaves_out_skipped_steps():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 0.0)
    average = Ema(model, 0.5)
    no, yes = torch.tensor(0.0), torch.tensor(1.0)
    expected = 0.0
    for step, weight in ((1, 1.0), (2, 2.0), (30, 4.0)):
        torch.nn.init.constant_(model.weight, weight)
        average.update(step, no)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
        assert average.values["weight"].item() == pytest.approx(expected)
        average.update(step, yes)
        assert average.values["weight"].item() == pytest.approx(expected)
    with average.swapped_in():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 4.0


def test_the_average_is_resumed_bitwise_and_released_when_asked(corpus, tmp_path):
    last, _ = run(corpus, tmp_path / "last", ema=0.9)
    whole, _ = run(corpus, tmp_path / "whole", ema=0.9, ema_release=True)
    run(corpus, tmp_path / "parts", ema=0.9, ema_release=True)
    shutil.rmtree(published(tmp_path / "parts/checkpoints")[-1])
    model, _ = run(corpus, tmp_path / "parts", ema=0.9, ema_release=True)
    assert equal(whole, model) and not equal(whole, last)
    saved = load_file(published(tmp_path / "whole/checkpoints")[-1] / "ema.safetensors")
    for name, parameter in whole.named_parameters():
        assert torch.equal(saved[f"student.{name}"], parameter)
    plain, _ = run(corpus, tmp_path / "plain")
    assert equal(plain, last), "keeping an average changes the training itself"


def test_loader_workers_change_nothing_also_after_a_restart_within_an_epoch(corpus, tmp_path):
    plain, _ = run(corpus, tmp_path / "plain")
    run(corpus, tmp_path / "workers", loader_workers=2)
    shutil.rmtree(published(tmp_path / "workers/checkpoints")[-1])
    model, said = run(corpus, tmp_path / "workers", loader_workers=2)
    assert "continuing after step 4" in said[-1] and equal(plain, model)


def test_a_dead_loader_worker_ends_the_run_with_a_message(corpus, tmp_path):
    def evaluate(*_):
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(1)
        return {"accuracy": 0.5}

    with pytest.raises(RunError, match="loader worker is dead"):
        run(corpus, tmp_path, steps=500, loader_workers=1, job={"evaluate": evaluate}, evaluate_every=2)


FAILING = """
from distill.data.batches import TrainingBatches
from distill.data.corpus import load_corpus
from distill.data.tasks import TASKS
from pathlib import Path
import sys
corpus = load_corpus(Path(sys.argv[1]), TASKS["classification"]())
for step in TrainingBatches(corpus, range(8), 4, 4, 0).stream(0, 100, 0, 1, workers=2):
    raise ValueError("a defect")
"""


@pytest.mark.slow
def test_a_process_that_fails_does_not_wait_for_its_loader_workers(corpus, tmp_path):
    given = [sys.executable, "-c", FAILING, str(corpus.train.path.parent)]
    done = subprocess.run(given, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 1 and done.stderr.endswith("ValueError: a defect\n"), done.stderr


@pytest.mark.slow
def test_a_hanging_loader_worker_ends_the_run_with_a_message(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "WORKER_TIMEOUT", 1)
    monkeypatch.setattr(batches, "collate", lambda *_: time.sleep(60))
    with pytest.raises(RunError, match="hangs: DataLoader timed out"):
        run(corpus, tmp_path, loader_workers=1)


def test_a_full_disk_is_noticed_before_anything_is_written(corpus, tmp_path, monkeypatch):
    run(corpus, tmp_path, steps=4)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        RunError, match=r"needs \d+\.\d\d MB and .* has 0\.00 MB left.*last good checkpoint is .*step-00000004"
    ):
        run(corpus, tmp_path, steps=6)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_write_that_fails_half_way_leaves_nothing_behind(corpus, tmp_path):
    run(corpus, tmp_path, steps=4)
    before = sorted((tmp_path / "checkpoints").rglob("*"))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # as a quota does
    try:
        with pytest.raises(RunError, match=r"cannot be written: .*; the last good checkpoint is .*step-00000004"):
            run(corpus, tmp_path, steps=6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert sorted((tmp_path / "checkpoints").rglob("*")) == before


def test_memory_that_ends_outside_of_a_pass_is_said_in_one_line(corpus, tmp_path):
    def evaluate(*_):
        raise torch.OutOfMemoryError("no more")

    with pytest.raises(RunError, match=r"out of memory: no more; the last good checkpoint is .*step-00000002"):
        run(corpus, tmp_path, job={"evaluate": evaluate}, evaluate_every=3)


def test_weights_that_are_not_finite_are_never_published(tmp_path):
    shelf = checkpoint.Checkpoints(tmp_path, MADE_FROM, print)
    with pytest.raises(RunError, match=r"not finite \(w\): not saved; there is no checkpoint yet"):
        save(shelf, checkpoint.TrainState(step=1), {"model": {"w": torch.tensor([1.0, math.inf])}})
    assert shelf.published() == [] and list(tmp_path.iterdir()) == []


def stopping_after(count):
    """An evaluation that is interrupted by a signal the first time, after so many batches."""
    calls = iter(range(100))

    def evaluate(_model, stopped):
        if next(calls) == 0:
            for _ in range(count):
                assert not stopped()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopped()
        return {"accuracy": 0.5}

    return evaluate


def test_a_signal_during_an_evaluation_saves_at_once_and_the_evaluation_is_made_up_for(corpus, tmp_path):
    whole, _ = run(corpus, tmp_path / "whole")
    evaluate = stopping_after(3)
    with pytest.raises(Stopped, match="after step 3 of 6"):
        run(corpus, tmp_path / "parts", job={"evaluate": evaluate}, evaluate_every=3)
    assert published(tmp_path / "parts/checkpoints")[-1].name == "step-00000003"
    model, _ = run(corpus, tmp_path / "parts", job={"evaluate": evaluate}, evaluate_every=3)
    assert equal(whole, model)
    records = read_records(tmp_path / "parts/metrics.jsonl")
    assert [r["step"] for r in records if r["event"] == "evaluate"] == [3, 6]


def test_a_signal_during_an_evaluation_loses_no_record_and_no_token(corpus, tmp_path):
    often, job = {"log_every": 5, "save_every": 0, "evaluate_every": 3}, {"evaluate": stopping_after(0)}
    run(corpus, tmp_path / "whole", **often)
    with pytest.raises(Stopped, match="after step 3 of 6"):
        run(corpus, tmp_path / "parts", job=job, **often)
    run(corpus, tmp_path / "parts", job=job, **often)
    whole, parts = (read_records(tmp_path / kind / "metrics.jsonl") for kind in ("whole", "parts"))
    assert [(record["event"], record["step"]) for record in parts[:2]] == [("train", 3), ("evaluate", 3)]
    assert parts[-2]["tokens"] == whole[-1]["tokens"]


def test_an_evaluation_that_was_saved_with_its_step_is_not_made_again(corpus, tmp_path):
    job = {"evaluate": lambda *_: {"accuracy": 0.5}}
    run(corpus, tmp_path, job=job, evaluate_every=2)
    shutil.rmtree(published(tmp_path / "checkpoints")[-1])
    run(corpus, tmp_path, job=job, evaluate_every=2)
    records = read_records(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if r["event"] == "evaluate"] == [2, 4, 6]


def test_the_best_checkpoint_by_a_metric_is_kept_apart(corpus, tmp_path):
    values = iter([0.5, 0.9, None, 0.7])
    job = {"evaluate": lambda _model, _stopped: {"accuracy": next(values)}}
    run(corpus, tmp_path, steps=8, job=job, evaluate_every=2, keep_best="accuracy")
    (best,) = published(tmp_path / "checkpoints/best")
    assert best.name == "step-00000004" and checkpoint.fault_of(best) is None
    assert json.loads((best / "state.json").read_text())["best"] == 0.9
    assert [path.name for path in published(tmp_path / "checkpoints")] == ["step-00000006", "step-00000008"]


def test_the_best_can_be_of_a_lower_step_than_the_one_it_replaces(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, MADE_FROM, print, keep=1)
    for step in (6, 4):
        save(checkpoints, checkpoint.TrainState(step=step), {"model": {"w": torch.ones(1)}})
    assert [path.name for path in published(tmp_path)] == ["step-00000004"]


def test_lower_can_be_better(corpus, tmp_path):
    values = iter([3.0, 2.0, 2.5])
    job = {"evaluate": lambda *_: {"loss": next(values)}, "higher_is_better": False}
    run(corpus, tmp_path, job=job, evaluate_every=2, keep_best="loss")
    assert [path.name for path in published(tmp_path / "checkpoints/best")] == ["step-00000004"]

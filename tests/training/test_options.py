"""The choices that a recipe has about a training."""

from __future__ import annotations

import re
import shutil
import sys
import time
from types import ModuleType

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from hypothesis import given
from hypothesis import strategies as st
from running import LABELS, MADE_FROM, dropped, published, run
from safetensors.torch import load_file
from tiny import tiny_batch, tiny_model

from distill.data import TrainingBatches
from distill.errors import InputError
from distill.losses import Objective
from distill.models.forward import Capture, Outputs, to_device
from distill.pipeline.train_checks import check_optimization
from distill.recipe.schema import Training
from distill.teacher import LiveTeacher
from distill.training import Job, loop, read_records, tracking, train
from distill.training.clock import Utilisation
from distill.training.learner import gradient_checkpointing
from distill.training.optim import lr_factor
from distill.training.setup import horizon
from distill.training.tracking import check_trackers, numbers_in, summary


def test_wsd_by_hand():
    values = [lr_factor(step, 10, 2, "wsd", 0.4) for step in range(10)]
    assert values == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert [lr_factor(step, 4, 0, "wsd", 2) for step in range(4)] == [1, 1, 1, 0.5]
    assert lr_factor(3, 4, 0, "wsd", 0) == 1


def test_a_token_budget_ends_with_the_step_that_reaches_it(corpus):
    batches = TrainingBatches(corpus, corpus.labelled, 8, 8, 0)
    seen, steps = 0, []
    for ((_, batch),) in batches.stream(0, 12, 0, 1):  # four epochs of 24 examples
        seen += int(batch["attention_mask"].sum())
        steps.append(seen)
    for tokens in (1, steps[0], steps[0] + 1, steps[5] - 1, steps[5], steps[5] + 1, steps[11]):
        expected = int(np.searchsorted(steps, tokens)) + 1
        assert horizon(Training(tokens=tokens), batches) == expected, tokens


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_more_tokens_never_take_fewer_steps(corpus, first, second):
    batches = TrainingBatches(corpus, corpus.labelled, 8, 8, 0)
    few, many = sorted((first, second))
    assert batches.steps_for_tokens(few) <= batches.steps_for_tokens(many)


def test_tokens_are_counted_without_padding(corpus, tmp_path):
    run(corpus, tmp_path, steps=3, log_every=1)
    expected = 0
    for step, record in zip(
        TrainingBatches(corpus, corpus.labelled, 8, 4, 0).stream(0, 3, 0, 1),
        read_records(tmp_path / "metrics.jsonl"),
        strict=True,
    ):
        expected += sum(int(batch["attention_mask"].sum()) for _, batch in step)
        assert record["tokens"] == expected and record["tokens_per_s"] > 0


def test_an_optimizer_of_the_users_own(corpus, tmp_path):
    spec = {"optimizer": "torch.optim:SGD", "optimizer_params": {"momentum": 0.5}, "save_every": 2}
    whole, _ = run(corpus, tmp_path / "whole", **spec)
    run(corpus, tmp_path / "parts", steps=6, **spec)
    shutil.rmtree(published(tmp_path / "parts/checkpoints")[-1])
    model, _ = run(corpus, tmp_path / "parts", **spec)
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    moments = load_file(published(tmp_path / "whole/checkpoints")[-1] / "optimizer.safetensors")
    assert {name.rsplit("/", 1)[1] for name in moments} == {"momentum_buffer"}


class Counting(torch.optim.SGD):
    """Counts its steps in plain numbers, and moves by as much."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                own = self.state[parameter]
                own["steps"] = own.get("steps", 0) + 1
                assert type(own["steps"]) in (int, float)
                parameter.add_(parameter.grad, alpha=-group["lr"] * own["steps"])


class Growing(torch.optim.SGD):
    """Keeps one number for all of a group, as optimizers that look for their own rate do."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        for group in self.param_groups:
            group |= {"d": 1.0, "k": 0}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["d"], group["k"] = group["d"] * 1.5, group["k"] + 1
            assert type(group["k"]) is int
            for parameter in group["params"]:
                parameter.add_(parameter.grad, alpha=-group["lr"] * group["d"])


@pytest.mark.parametrize("kind", [Counting, Growing], ids=["of a parameter", "of a group"])
def test_plain_numbers_that_an_optimizer_keeps_are_resumed(kind, corpus, tmp_path, monkeypatch):
    module = ModuleType("my_optimizers")
    module.Own = kind
    monkeypatch.setitem(sys.modules, "my_optimizers", module)
    whole, _ = run(corpus, tmp_path / "whole", optimizer="my_optimizers:Own")
    run(corpus, tmp_path / "parts", optimizer="my_optimizers:Own")
    shutil.rmtree(published(tmp_path / "parts/checkpoints")[-1])
    model, _ = run(corpus, tmp_path / "parts", optimizer="my_optimizers:Own")
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


class Impatient(torch.optim.SGD):
    """Takes no closure, which Accelerate gives."""

    def step(self):
        return super().step()


def some(groups, *, lr):
    return torch.optim.SGD(groups[:1], lr=lr)


@pytest.mark.parametrize(
    ("optimizer", "params", "message"),
    [
        ("mine:nothing", {}, "optimizer: mine:nothing must return a torch.optim.Optimizer"),
        ("os:system", {}, "optimizer: os:system cannot be used: TypeError: system() takes at most 1 argument"),
        ("torch.optim:SGD", {"epz": 1.0}, "optimizer_params.epz: SGD has no parameter 'epz'"),
        (
            "torch.optim:SGD",
            {"nesterov": True},
            "torch.optim:SGD cannot be used: Nesterov momentum requires a momentum",
        ),
        ("torch.optim:LBFGS", {}, "cannot be used: LBFGS doesn't support per-parameter options"),
        ("torch.optim:Muon", {}, "cannot be used: Muon only supports 2D parameters"),
        ("torch.optim:SparseAdam", {}, "cannot be used: RuntimeError: SparseAdam does not support dense gradients"),
        ("mine:Impatient", {}, "cannot be used: TypeError: Impatient.step() takes 1 positional argument"),
        ("mine:some", {}, "mine:some takes 1 of the 2 parameters that it is given, and the others would never learn"),
        ("adamw", {"eps": -1.0}, "optimizer: adamw cannot be used: Invalid epsilon value: -1.0"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_one_line_before_anything_is_done(optimizer, params, message, monkeypatch):
    module = ModuleType("mine")
    module.nothing, module.some, module.Impatient = lambda groups, *, lr: None, some, Impatient
    monkeypatch.setitem(sys.modules, "mine", module)
    spec = Training(steps=1, optimizer=optimizer, optimizer_params=params)
    before = torch.get_rng_state()
    with pytest.raises(InputError, match=f"^training.*{re.escape(message)}"):
        check_optimization("training", spec, "sequence")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradient_checkpointing_changes_no_gradient(family):
    from distill.training.model import DistillModel

    head = "sequence" if family == "bert" else "next_token"
    results = []
    for enabled in (False, True):
        student = tiny_model(family, **(dropped(0.1) if family == "bert" else {}))
        if enabled:
            gradient_checkpointing(student, "enable")({"use_reentrant": False})
        model = DistillModel(student, Objective(LABELS, head)).train()
        batch = tiny_batch()
        batch["labels"] = torch.tensor([0, 1, 2]) if family == "bert" else batch["input_ids"]
        torch.manual_seed(0)
        loss, _ = model(batch, None, model.objective.counts([batch]))
        loss.backward()
        results.append((loss.detach(), [p.grad for p in student.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_gradient_checkpointing_in_a_run_gives_the_same_weights_and_is_taken_back(corpus, tmp_path):
    plain, _ = run(corpus, tmp_path / "plain")
    model, _ = run(corpus, tmp_path / "less", gradient_checkpointing=True)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
def test_compiled_layers_compute_the_same_and_are_plain_again_afterwards(corpus, tmp_path):
    for name, compiled in (("plain", False), ("compiled", True)):
        model, _ = run(corpus, tmp_path / name, dropout=0.0, compile=compiled)
        assert not any("forward" in vars(layer) for layer in model.bert.encoder.layer)
    losses = [[r["loss"] for r in read_records(tmp_path / f"{name}/metrics.jsonl")] for name in ("plain", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_teacher_in_another_dtype_answers_on_the_device_of_the_batch():
    model, batch = tiny_model("bert"), tiny_batch()
    plain = LiveTeacher(model, Capture(hidden=(0,)), torch.device("cpu"))(batch)
    half = LiveTeacher(model.to(torch.bfloat16), Capture(hidden=(0,)), torch.device("cpu"))(batch)
    assert half.hidden[0].dtype == torch.bfloat16 and half.logits.dtype == torch.float32  # the last map is not rounded
    assert half.logits.device == batch["input_ids"].device
    torch.testing.assert_close(half.logits.float(), plain.logits, rtol=0.05, atol=0.05)


def test_everything_in_outputs_is_moved():
    one = torch.ones(1)
    outputs = Outputs(torch.zeros(2), {3: one}, relations={0: [one]})
    meta = to_device({"own": outputs, "other": "text"}, torch.device("meta"))
    assert meta["own"].logits.device.type == meta["own"].hidden[3].device.type == "meta" and meta["other"] == "text"
    assert meta["own"].relations[0][0].device.type == "meta"


class Recorder(GeneralTracker):
    name, requires_logging_directory = "recorder", False

    def __init__(self):
        super().__init__()
        self.records, self.ended = [], False

    @property
    def tracker(self):
        return self.records

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **_):
        self.records.append((step, values))

    def finish(self):
        self.ended = True


def test_records_reach_the_trackers_of_accelerate(corpus, tmp_path):
    recorder = Recorder()
    spec = Training(steps=4, batch_size=8, micro_batch_size=4, log_every=2).model_copy(update={"trackers": [recorder]})
    batches = TrainingBatches(corpus, corpus.labelled, 8, 4, 0)
    job = Job("test", spec, tmp_path, 0, MADE_FROM)
    model = tiny_model("bert", num_labels=len(corpus.classes))
    objective = Objective(LABELS, "sequence")
    measured = {"accuracy": 0.5, "kl": None}
    train(job, model, objective, None, batches, evaluate=lambda *_: measured, say=print)
    assert [step for step, _ in recorder.records] == [2, 4, 4] and recorder.ended
    first, last = recorder.records[0][1], recorder.records[-1][1]
    assert {"loss", "terms/labels", "lr", "grad_norm", "tokens_per_s", "skipped"} <= first.keys()
    assert last.pop("seconds") >= 0 and last == {"step": 4, "metrics/accuracy": 0.5}


def test_tensorboard_writes_its_files(corpus, tmp_path):
    spec = Training(steps=2, batch_size=8, micro_batch_size=4, log_every=1, trackers=["tensorboard"])
    batches = TrainingBatches(corpus, corpus.labelled, 8, 4, 0)
    job = Job("test", spec, tmp_path / "run", 0, MADE_FROM)
    model, objective = tiny_model("bert", num_labels=len(corpus.classes)), Objective(LABELS, "sequence")
    train(job, model, objective, None, batches, say=print)
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'distill\[wandb\]'"):
        check_trackers(["wandb"])


def test_a_record_becomes_flat_numbers_and_one_line():
    record = {
        "event": "train", "step": 3, "loss": None, "terms": {"labels": 1.5, "kl": None}, "lr": 1e-4,
        "tokens_per_s": 1234.5, "mfu": 0.417, "skipped": 2,
    }  # fmt: skip
    assert dict(numbers_in(record)) == {
        "step": 3,
        "terms/labels": 1.5,
        "lr": 1e-4,
        "tokens_per_s": 1234.5,
        "mfu": 0.417,
        "skipped": 2,
    }
    line = "loss - (labels 1.5  kl -)  lr 1.00e-04  1,234 tokens/s"
    assert summary(record) == f"{line} (MFU 42%)  2 skipped"
    assert summary(record | {"mfu": None}) == f"{line}  2 skipped"
    assert "(MFU 239%; above 1: the rate of matrix products was measured too low" in summary(record | {"mfu": 2.39})


def test_a_rate_that_was_measured_too_low_is_measured_again():
    said, rates = [], [100.0, 400.0, 300.0]
    share = Utilisation(lambda: rates.pop(0), said.append)
    assert share.of(80.0) == 0.8 and len(rates) == 2  # nothing is measured while it is plausible
    assert share.of(239.0) == pytest.approx(239 / 400)
    assert said == [
        "MFU 239%: the rate of matrix products was measured too low, while something else ran; "
        "measured again, it is 4.00 times as high"
    ]
    assert share.of(500.0) == 1.25 and len(said) == 1  # the best one stays, and nothing is cut off


def test_measuring_again_never_ends_a_training_for_lack_of_memory():
    rates = [100.0]

    def measure():
        if not rates:
            raise torch.OutOfMemoryError("no room for the matrices")
        return rates.pop()

    assert Utilisation(measure, print).of(150.0) == 1.5


def test_evaluations_and_saves_have_their_own_seconds_and_are_in_no_window(corpus, tmp_path, monkeypatch):
    pause = 0.5

    def evaluate(*_):
        time.sleep(pause)
        return {"accuracy": 0.5}

    plain = loop._Run._hand_over
    monkeypatch.setattr(loop._Run, "_hand_over", lambda *given: (time.sleep(pause), plain(*given))[1])
    began = time.monotonic()
    run(corpus, tmp_path, job={"evaluate": evaluate}, evaluate_every=2, steps=6)  # looks and saves at 2, 4 and 6
    whole = time.monotonic() - began
    records = read_records(tmp_path / "metrics.jsonl")
    looks = [record["seconds"] for record in records if record["event"] == "evaluate"]
    steps = [record for record in records if record["event"] == "train"]
    assert len(looks) == 3 and min(looks) >= pause
    assert steps[0]["save_seconds"] == 0 and min(record["save_seconds"] for record in steps[1:]) >= pause
    assert sum(8 * 2 / record["examples_per_s"] for record in steps) < whole - 6 * pause


def test_a_terminal_shows_one_live_block(corpus, tmp_path, monkeypatch):
    import io

    from rich.console import Console

    screen = io.StringIO()
    monkeypatch.setattr(tracking, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=120))
    run(
        corpus,
        tmp_path,
        job={"evaluate": lambda *_: {"accuracy": 0.25}, "utilisation": Utilisation(lambda: 1e6, print)},
    )
    text = screen.getvalue()
    for words in ("6/6", "0:00:0", "GB", "loss", "tokens/s", "(MFU ", "held out: accuracy 0.25", "\x1b["):
        assert words in text, words

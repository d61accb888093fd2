"""Compiled layers: how often something is compiled, what happens where it cannot be, and that nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from running import HIDDEN, LABELS, MADE_FROM, dropped
from tiny import FORMS, tiny_model

from distill.data import TrainingBatches, evaluation_batches
from distill.data.batches import padded_sizes
from distill.evaluation.predict import predict
from distill.losses import Objective, layer_map
from distill.models.family import all_layers
from distill.models.forward import Capture, forward
from distill.models.padding import mark_padding
from distill.recipe.schema import Term, Training
from distill.teacher import LiveTeacher
from distill.training import Job, compiled, read_records, train
from distill.training.compiled import CompiledLayers

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself


class Counting:
    """A backend that runs a graph as it is, and counts graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def backend(monkeypatch):
    torch._dynamo.reset()
    counting = Counting()
    monkeypatch.setattr(compiled, "BACKEND", counting)
    yield counting
    torch._dynamo.reset()


def with_a_teacher(corpus, folder, *, evaluate=None, student=None, teacher=None, **spec):
    """Train on logits and hidden states; returns (student, teacher, what was said)."""
    classes = len(corpus.classes)
    student = student or tiny_model("bert", **dropped(0.0), num_labels=classes)
    teacher = teacher or tiny_model("bert", **dropped(0.0), num_labels=classes, seed=1)
    objective = Objective(HIDDEN, "sequence", lambda policy: layer_map(policy, None, 4, 4))
    usual = {"steps": 9, "batch_size": 8, "micro_batch_size": 4, "lr": 1e-3, "log_every": 1}
    spec = Training(**usual | spec)
    batches = TrainingBatches(corpus, corpus.labelled, spec.batch_size, spec.micro_batch_size, 0)
    said = []
    live = LiveTeacher(teacher, objective.teacher, torch.device("cpu"))
    train(
        Job("test", spec, folder, 0, MADE_FROM), student, objective, live, batches, evaluate=evaluate, say=said.append
    )
    return student, teacher, said


def losses(folder):
    return [record["loss"] for record in read_records(folder / "metrics.jsonl") if record["event"] == "train"]


def test_three_epochs_of_many_lengths_compile_no_more_than_one_layer_of_each_kind(corpus, tmp_path, backend):
    assert len(set(corpus.train.lengths[list(corpus.labelled)])) > 5
    with_a_teacher(corpus, tmp_path, compile=True)  # 24 labelled examples: 9 steps of 8 are three epochs
    # The student with gradient and the teacher without, each for the first length and for any other.
    assert backend.graphs == 4


def test_looks_at_other_lengths_and_numbers_of_rows_do_not_compile_again_and_again(corpus, tmp_path, backend):
    seen = []

    def evaluate(model, _stop):
        before = backend.graphs
        for size in (5, 3, 7, 6):
            predict(model, evaluation_batches(corpus, corpus.test, size), "sequence")
        seen.append(backend.graphs - before)
        return {}

    with_a_teacher(corpus, tmp_path, compile=True, evaluate=evaluate, evaluate_every=3)
    assert len(seen) == 3 and seen[0] <= 3 and seen[1:] == [0, 0]


def test_layers_of_other_widths_are_compiled_each_and_none_is_given_up(corpus, tmp_path, backend):
    """More shapes than torch would compile by itself before it goes back to plain layers."""
    narrow = tiny_model("bert", **dropped(0.0), num_labels=len(corpus.classes))
    for layer, width in zip(narrow.bert.encoder.layer, (8, 16, 24, 32), strict=True):
        layer.intermediate.dense = torch.nn.Linear(32, width)
        layer.output.dense = torch.nn.Linear(width, 32)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        _, _, said = with_a_teacher(corpus, tmp_path, compile=True, student=narrow, steps=2)
    assert 4 + 1 < backend.graphs <= 2 * (4 + 1) and "cannot be compiled" not in " ".join(said)


def test_compiled_layers_compute_what_plain_ones_do_and_are_plain_again_afterwards(corpus, tmp_path, backend):
    for name, choice in (("plain", False), ("compiled", True)):
        models = with_a_teacher(corpus, tmp_path / name, compile=choice)[:2]
        assert not any("forward" in vars(layer) for model in models for layer in model.bert.encoder.layer)
    assert backend.graphs and losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


@pytest.mark.parametrize("spec", [{"gradient_checkpointing": True}, {"precision": "bf16"}], ids=str)
def test_compiled_layers_go_with_other_choices(spec, corpus, tmp_path, backend):
    for name, choice in (("plain", False), ("compiled", True)):
        with_a_teacher(corpus, tmp_path / name, compile=choice, **spec)
    assert backend.graphs and losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)


def test_auto_leaves_the_layers_on_a_cpu_and_the_batches_as_they_are(corpus, tmp_path, backend):
    _, _, said = with_a_teacher(corpus, tmp_path / "auto")
    with_a_teacher(corpus, tmp_path / "plain", compile=False)
    assert said == [] and backend.graphs == 0 and losses(tmp_path / "auto") == losses(tmp_path / "plain")
    assert Training(steps=1).compile == "auto"


@pytest.mark.parametrize("fails_after", [0, 1, 3])
def test_layers_that_cannot_be_compiled_run_as_they_are_with_one_line(
    fails_after, corpus, tmp_path, backend, monkeypatch
):
    def broken(graph, inputs):
        if backend.graphs >= fails_after:
            raise NotImplementedError("no such kernel")
        return backend(graph, inputs)

    monkeypatch.setattr(compiled, "BACKEND", broken)
    _, _, said = with_a_teacher(corpus, tmp_path / "compiled", compile=True)
    monkeypatch.undo()
    with_a_teacher(corpus, tmp_path / "plain", compile=False)
    (line,) = [line for line in said if "cannot be compiled" in line]
    assert "run as they are" in line and "no such kernel" in line
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_rows_are_padded_to_few_lengths_where_layers_are_compiled_and_a_line_says_how_much(corpus, tmp_path, backend):
    _, _, said = with_a_teacher(corpus, tmp_path, compile=True)
    longest = int(corpus.train.lengths.max())
    (line,) = said
    sizes = padded_sizes(longest)
    assert f"padded to {len(sizes)} lengths up to {longest}" in line
    batches = TrainingBatches(corpus, corpus.labelled, 8, 4, 0)
    plain = padded = 0
    for step, wide in zip(batches.stream(0, 9, 0, 1), batches.in_sizes().stream(0, 9, 0, 1), strict=True):
        for (_, batch), (_, other) in zip(step, wide, strict=True):
            width = batch["input_ids"].shape[1]
            assert other["input_ids"].shape[1] in sizes
            assert torch.equal(other["input_ids"][:, :width], batch["input_ids"])
            assert torch.equal(other["labels"], batch["labels"]) and not other["attention_mask"][:, width:].any()
            plain, padded = plain + batch["input_ids"].numel(), padded + other["input_ids"].numel()
    assert f"{padded / plain - 1:.1%} more positions (in the first 9 steps)" in line


def test_padded_sizes_are_few_and_end_at_the_longest_row():
    assert padded_sizes(14) == (8, 14) and padded_sizes(5) == (5,) and padded_sizes(64) == (*range(8, 65, 8),)
    assert padded_sizes(2048) == (*range(128, 2049, 128),) and padded_sizes(1000)[-2:] == (960, 1000)
    for longest in range(1, 5000, 7):
        sizes = padded_sizes(longest)
        assert len(sizes) <= 16 and sizes[-1] == longest and all(size % 8 == 0 for size in sizes[:-1])
        assert np.diff((0, *sizes)).max() <= max(8, longest / 16 + 8)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_layers_of_every_form_are_compiled_twice_at_most_and_hooks_see_their_outputs(form, backend):
    """Once for the first length and once for any other, for each kind of layer: T5's first has a bias of its own."""
    model, layers = tiny_model(form).eval(), CompiledLayers("test", print)

    def states(length):
        ids = torch.randint(3, 60, (3, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[1, -3:] = 0
        batch = mark_padding({"input_ids": ids, "attention_mask": mask, "labels": ids})
        model.zero_grad()
        found = forward(model, batch, Capture(hidden=(-1, 0, 2))).hidden
        found[2].sum().backward()
        return [*found.values(), *(own.grad for own in model.parameters() if own.grad is not None)]

    plain = [states(length) for length in (8, 16, 24, 32)]
    layers.compile(all_layers(model))
    compiled_too = [states(length) for length in (8, 16, 24, 32)]
    layers.remove()
    torch.testing.assert_close(compiled_too, plain, rtol=1e-6, atol=1e-6)
    assert backend.graphs <= 2 * {"t5": 4, "t5-gated": 4, "bart": 2, "qwen3_moe": 2}.get(form, 1)


def test_auto_says_why_it_leaves_layers_alone(corpus):
    from accelerate import Accelerator

    reads = Objective([Term(match="relations", map=[(0, 0)])], "sequence", lambda policy: layer_map(policy, None, 4, 4))
    accelerator = Accelerator(cpu=True)
    assert compiled._reason_against(Objective(LABELS, "sequence"), accelerator) is None
    assert "relations" in compiled._reason_against(reads, accelerator)

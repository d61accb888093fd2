"""The memory of a training by hand and by measurement, and that every kind of training can be rehearsed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny import FORMS, HIDDEN, LAYERS, VOCABULARY, WIDTH, tiny_batch, tiny_model
from torch.profiler import ProfilerActivity, profile

from distill.losses import layer_map
from distill.losses.chunked import chunk_size
from distill.models.head import output_head
from distill.pipeline.rehearsal import Rehearsal, _loss_bytes, _loss_bytes_at, autocast, rehearse_memory, state_bytes
from distill.pipeline.resources import changes, time_of
from distill.pipeline.timing import StepTime, advise_depth, extrapolate, rehearse_time
from distill.pipeline.trainings import Work
from distill.recipe.schema import Term, Training
from distill.recipe.sections import Lora
from distill.training import compiled

CPU = torch.device("cpu")
LABELS, LOGITS = Term(match="labels"), Term(match="logits")
HIDDEN_TERM = Term(match="hidden", map=[(0, 1), (1, 3)])
LINEAR = 4 * HIDDEN * HIDDEN + 2 * HIDDEN * WIDTH
"""Weights of the linear maps of one layer of a tiny BERT."""


def rehearsal(*, family="bert", terms=(LABELS,), rows=1, length=2, taught=False, passes=1, **spec):
    batch = tiny_batch(rows=rows, length=length, padded=False)
    batch["labels"] = torch.zeros(rows, dtype=torch.int64) if family == "bert" else batch["input_ids"]
    kind = "sequence" if family == "bert" else "next_token"
    usual = {"steps": 1, "batch_size": rows, "micro_batch_size": rows}
    maps = partial(layer_map, plan=None, student_layers=LAYERS, teacher_layers=LAYERS)
    make = partial(tiny_model, family)
    return Rehearsal(
        "distilled", Training(**usual | spec), make, make if taught else None, terms, kind, batch, passes, maps
    )


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def fixed(peak):
    """What does not depend on the batch."""
    return {name: size for name, size in peak.parts.items() if name not in ("activations", "loss")}


def test_weights_gradients_and_moments_are_4_4_and_8_bytes_for_each_parameter():
    model = tiny_model("bert")
    peak = rehearse_memory(rehearsal(ema=0.9), CPU)
    parameters, ids = count(model), 8 * model.config.max_position_embeddings * 2  # positions and token types, int64
    assert peak.moment == "the optimizer's step"
    expected = {"weights": 4 * parameters + ids, "gradients": 4 * parameters, "optimizer": 8 * parameters}
    assert fixed(peak) == expected | {"average": 4 * parameters}


def test_what_is_frozen_has_neither_gradient_nor_moments():
    model = tiny_model("bert")
    learning = sum(own.numel() for name, own in model.named_parameters() if "embeddings" not in name)
    parts = fixed(rehearse_memory(rehearsal(freeze=["*embeddings*"], passes=2), CPU))
    assert (parts["gradients"], parts["optimizer"]) == (4 * learning, 8 * learning)


def test_bf16_weights_with_their_masters_are_10_bytes_for_each_parameter():
    parts = fixed(rehearse_memory(rehearsal(weights="bf16", precision="bf16", passes=2), CPU))
    model = tiny_model("bert")
    ids = 8 * model.config.max_position_embeddings * 2
    assert sum(parts.values()) - ids == 10 * count(model)
    assert parts["gradients"] == 2 * count(model)


def test_moments_of_8_bits_have_a_scale_for_256_weights_and_small_tensors_keep_fp32():
    spec = Training(steps=1, optimizer="adamw_8bit")
    assert state_bytes(spec, torch.empty(4095)) == 8 * 4095
    assert state_bytes(spec, torch.empty(4097)) == 2 * 4097 + 2 * 4 * 17
    assert state_bytes(spec, torch.empty(4097, dtype=torch.bfloat16)) == 2 * 4097 + 2 * 4 * 17 + 2 * 4097


def test_adapters_alone_have_gradients_and_moments():
    rank, model = 2, tiny_model("bert")
    maps = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN, WIDTH), (WIDTH, HIDDEN)]
    adapters = LAYERS * sum(rank * (read + written) for read, written in maps)
    parts = fixed(rehearse_memory(rehearsal(lora=Lora(rank=rank), passes=2), CPU))
    ids = 8 * model.config.max_position_embeddings * 2
    assert parts == {
        "weights": 4 * (count(model) + adapters) + ids,
        "gradients": 4 * adapters,
        "optimizer": 8 * adapters,
    }


def test_a_teacher_counts_in_its_own_dtype_and_not_where_it_is_elsewhere():
    usual = rehearsal(terms=(LABELS, LOGITS), taught=True)
    ids = 8 * tiny_model("bert").config.max_position_embeddings * 2
    assert rehearse_memory(usual, CPU).parts["teacher"] == 4 * count(tiny_model("bert")) + ids
    elsewhere = Rehearsal(**{**vars(usual), "teacher_device": "cpu"})
    assert "teacher" not in rehearse_memory(elsewhere, torch.device("cuda")).parts
    assert "teacher" in rehearse_memory(elsewhere, CPU).parts  # where the device is the CPU it is nowhere else
    eight = Rehearsal(**{**vars(usual), "teacher_dtype": "int8"})
    scales = 4 * (LAYERS * (5 * HIDDEN + WIDTH) + HIDDEN + 3)  # of each row, the pooler's and the classes' included
    linear = LAYERS * LINEAR + HIDDEN * HIDDEN + 3 * HIDDEN
    saved = rehearse_memory(usual, CPU).parts["teacher"] - rehearse_memory(eight, CPU).parts["teacher"]
    assert saved == 3 * linear - scales


def test_a_teacher_in_fp8_has_a_byte_for_each_weight_of_the_maps_of_its_layers_and_nothing_smaller_is_named():
    usual = rehearsal(terms=(LABELS, LOGITS), taught=True)
    eight = Rehearsal(**{**vars(usual), "teacher_dtype": "fp8"})
    saved = rehearse_memory(usual, CPU).parts["teacher"] - rehearse_memory(eight, CPU).parts["teacher"]
    assert saved == LAYERS * (3 * LINEAR - 4 * (5 * HIDDEN + WIDTH))  # all sizes are multiples of 16
    named = [label for label, _ in changes(eight, torch.device("cuda"), 1)]
    assert "teacher.cache: {keep: hidden}" in named and not any("dtype" in label for label in named)
    assert time_of(Work(eight, 1, 2), CPU) == "a teacher in 8 bits, on the CPU or sharded is not timed"


def measured_peak(training):
    """Bytes that a real forward and backward pass allocate at most, above what is there before."""
    model = training.prepare(training.build(), None, training.terms)
    counts = model.objective.counts([training.batch])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # as the rehearsal of several passes has it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        with autocast(training.spec, CPU):
            loss = model(training.batch, None, counts)[0]
        loss.backward()
    now = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda own: own.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("spec", [{}, {"gradient_checkpointing": True}, {"precision": "bf16"}])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_activations_are_those_that_a_real_pass_allocates(family, spec):
    training = rehearsal(family=family, rows=16, length=32, passes=2, **spec)
    peak = rehearse_memory(training, CPU)
    planned = peak.parts["activations"] + peak.parts.get("loss", 0)
    assert planned == pytest.approx(measured_peak(training), rel=0.1)


def test_checkpointing_takes_activations_and_hidden_terms_add_some():
    usual, less, more = (
        rehearse_memory(rehearsal(family="llama", rows=8, length=32, taught=True, **own), CPU)
        for own in ({}, {"gradient_checkpointing": True}, {"terms": (LABELS, HIDDEN_TERM)})
    )
    assert less.total < usual.total < more.total


def test_the_loss_of_a_vocabulary_at_all_positions_follows_from_few():
    training = rehearsal(family="llama", terms=(LABELS, LOGITS), rows=40, length=64, taught=True)
    chunk, positions = chunk_size(VOCABULARY, CPU), 40 * 63
    assert positions > chunk
    heads = [output_head(model) for model in training.hollow()]
    whole = _loss_bytes_at(training, training.terms, heads, positions, chunk)
    assert _loss_bytes(training, heads, CPU) == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("family", FORMS)
def test_every_form_of_model_is_rehearsed(family):
    model = tiny_model(family)
    two = model.config.is_encoder_decoder
    kind = "sequence" if family == "bert" else "seq2seq" if two else "next_token"
    batch = tiny_batch(rows=2)
    batch["labels"] = torch.zeros(2, dtype=torch.int64) if family == "bert" else batch["input_ids"]
    maps = partial(layer_map, plan=None, student_layers=LAYERS - 1, teacher_layers=LAYERS - 1)
    terms = [Term(match="logits"), Term(match="hidden", map=[(0, 1)], stack="decoder" if two else None)]
    make, spec = partial(tiny_model, family), Training(steps=1, batch_size=2)
    training = Rehearsal("distilled", spec, make, make, terms, kind, batch, 1, maps, maps if two else None)
    assert rehearse_memory(training, CPU).parts["weights"] >= 4 * count(model)
    assert rehearse_time(training, CPU).seconds > 0


def test_terms_on_attention_and_relations_are_rehearsed():
    pairs = {"map": [(0, 1)]}
    terms = (Term(match="attention", **pairs), Term(match="relations", **pairs))
    training = rehearsal(terms=terms, taught=True, rows=2, length=8)
    assert rehearse_memory(training, CPU).total > rehearse_memory(rehearsal(rows=2, length=8), CPU).total
    assert rehearse_time(training, CPU).loss > 0


def test_the_time_of_a_layer_is_that_of_the_difference():
    # 1 s with one layer of 10, 2 s with three: half a second for each of the five others.
    assert extrapolate(1.0, 2.0, [10, 30, 80]) == 4.5
    assert extrapolate(1.0, 2.0, [30, 30, 30]) == 2.0  # it has no more layers than this
    assert extrapolate(2.0, 1.9, [10, 30, 80]) == 1.9  # noise is no speed


def test_longer_passes_take_longer_and_the_step_of_the_optimizer_does_not():
    time = StepTime(teacher=1.0, student=2.0, loss=3.0, optimizer=4.0)
    assert time.seconds == 10.0
    assert time.scaled(2.0).seconds == 16.0


def test_depth_is_not_named_where_nothing_is_gained_by_it():
    model = tiny_model("llama")
    assert advise_depth(model, model, 4, CPU) is None


def test_layers_are_timed_compiled_where_the_training_compiles_them(monkeypatch):
    graphs = []
    monkeypatch.setattr(compiled, "BACKEND", lambda graph, _inputs: graphs.append(graph) or graph.forward)
    training = rehearsal(family="llama", terms=(LOGITS,), rows=2, length=8, taught=True, compile=True)
    assert rehearse_time(training, CPU).student > 0 and graphs
    graphs.clear()
    assert rehearse_time(training.with_spec(compile="auto"), CPU).student > 0 and not graphs


def test_a_family_that_cannot_be_compiled_is_timed_as_it_is(monkeypatch):
    def broken(_graph, _inputs):
        raise NotImplementedError("no kernel for this")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    training = rehearsal(family="llama", terms=(LOGITS,), rows=2, length=8, taught=True, compile=True)
    assert rehearse_time(training, CPU).student > 0

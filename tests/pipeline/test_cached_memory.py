"""A training from a cache has no teacher in memory but its output head, and none in its time."""

from __future__ import annotations

from dataclasses import replace

import torch
from test_rehearsal import HIDDEN_TERM, LABELS, LOGITS, rehearsal
from tiny import HIDDEN, VOCABULARY, tiny_model

from distill.pipeline.rehearsal import rehearse_memory
from distill.pipeline.resources import changes
from distill.pipeline.timing import rehearse_time
from distill.recipe.cache import TeacherCache
from distill.recipe.schema import Term

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def taught(**cache):
    live = rehearsal(family="llama", terms=(LOGITS, HIDDEN_TERM), taught=True, rows=4, length=16)
    return replace(live, cached=TeacherCache(**cache)) if cache else live


def test_of_a_cached_teacher_only_the_head_is_in_memory_and_of_its_likeliest_tokens_nothing():
    model = tiny_model("llama")
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())
    live, hidden, topk = (
        rehearse_memory(taught(**own), CPU) for own in ({}, {"keep": "hidden"}, {"keep": "topk", "k": 4})
    )
    assert whole <= live.parts["teacher"] < 1.1 * whole
    assert hidden.parts["teacher"] == 4 * VOCABULARY * HIDDEN and "teacher" not in topk.parts
    for name in ("weights", "optimizer"):
        assert live.parts[name] == hidden.parts[name] == topk.parts[name]


def test_a_cached_teacher_takes_no_time_and_the_rest_of_the_step_is_timed():
    time = rehearse_time(taught(keep="topk", k=4), CPU)
    assert time.teacher == 0 < time.student and time.loss > 0


def test_a_cache_is_named_among_what_makes_it_fit_where_it_keeps_all_that_is_compared():
    def last(*terms):
        own = rehearsal(terms=terms, taught=True, rows=8, length=32)
        return [label for label, _ in changes(own, GPU, 1)][-1], own

    assert last(LABELS, LOGITS)[0] == "teacher.cache: {keep: hidden}"
    assert last(LABELS, Term(match="attention", map=[(0, 1)]))[0] == "teacher.device: cpu"
    cached = replace(last(LABELS, LOGITS)[1], cached=TeacherCache())
    assert not any(label.startswith("teacher") for label, _ in changes(cached, GPU, 1))

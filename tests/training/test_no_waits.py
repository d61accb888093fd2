"""Between two records the host never waits for the device: nothing that a step computes is read."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from running import MADE_FROM
from tiny import tiny_corpus, tiny_model, tiny_project
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from distill.data import TrainingBatches
from distill.losses import Objective, layer_map
from distill.models import padding
from distill.models.forward import Capture, forward
from distill.models.padding import PADDED, UNPADDED, mark_padding
from distill.recipe.schema import Term, Training
from distill.teacher import LiveTeacher
from distill.training import Job, train
from distill.training import step as steps
from distill.training.loop import _Run

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.nonzero.default)
"""On a GPU the host waits for each of these."""
TERMS = [Term(match="labels"), Term(match="logits", temperature=2.0), Term(match="hidden", map=[(1, 0), (3, 3)])]


class Reads(TorchDispatchMode):
    """Counts what is read from tensors while `on`."""

    def __init__(self):
        super().__init__()
        self.found, self.on = Counter(), False

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        if self.on and function in READS:
            self.found[str(function)] += 1
        return function(*args, **(kwargs or {}))


def on_the_host(reads, function):
    """Leave out what is done with a batch before it is moved."""

    def unwatched(*args, **named):
        before, reads.on = reads.on, False
        try:
            return function(*args, **named)
        finally:
            reads.on = before

    return unwatched


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prose")
    tiny_project(folder, family="llama")
    return tiny_corpus(folder, "data.task=causal_lm", "data.columns={text: text}", "data.labelled=null", packs=True)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_nothing_is_read_from_the_device_between_two_records(family, corpus, prose, tmp_path, monkeypatch):
    own = corpus if family == "bert" else prose
    reads = Reads()
    monkeypatch.setattr(padding, "READS_AT_ONCE", ())
    for place, name in ((steps, "token_count"), (Objective, "counts"), (Objective, "locate")):
        if hasattr(place, name):
            monkeypatch.setattr(place, name, on_the_host(reads, getattr(place, name)))
    monkeypatch.setattr(_Run, "log", on_the_host(reads, _Run.log))
    plain = steps.Step.__call__

    def watched(*args):
        reads.on = True
        try:
            return plain(*args)
        finally:
            reads.on = False

    monkeypatch.setattr(steps.Step, "__call__", watched)
    changes = {"num_labels": len(own.classes)} if family == "bert" else {}
    student, teacher = (tiny_model(family, seed=seed, **changes) for seed in (0, 1))
    objective = Objective(TERMS, own.head, lambda policy: layer_map(policy, None, 4, 4))
    live = LiveTeacher(teacher, objective.teacher, torch.device("cpu"))
    spec = Training(steps=6, batch_size=8, micro_batch_size=4, log_every=6, save_every=0, ema=0.9)
    pool = own.labelled or range(len(own.train))
    with reads:
        batches = TrainingBatches(own, pool, 8, 4, 0)
        train(Job("test", spec, tmp_path, 0, MADE_FROM), student, objective, live, batches, say=print)
    assert reads.found == {}


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "gemma2", "t5", "bart"])
@pytest.mark.parametrize("padded", [True, False])
def test_what_the_host_has_seen_of_the_padding_changes_no_output(family, padded, monkeypatch):
    monkeypatch.setattr(padding, "READS_AT_ONCE", ())
    model = tiny_model(family)
    ids = torch.randint(3, 60, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    marked = mark_padding(batch)
    assert (PADDED if padded else UNPADDED) in marked and len(marked) == len(batch) + 1
    reads = Reads()
    with torch.no_grad():
        plain = forward(model, batch, Capture()).logits
        with reads:
            reads.on = True
            known = forward(model, marked, Capture()).logits
    assert reads.found == {}
    torch.testing.assert_close(known, plain, rtol=0, atol=1e-6)


def test_rows_with_several_documents_need_no_look_at_their_positions(prose):
    ((_, batch),) = next(TrainingBatches(prose, range(len(prose.train)), 4, 4, 0).stream(0, 1, 0, 1))
    assert "position_ids" in batch
    model = tiny_model("llama")
    unmarked = {name: each for name, each in batch.items() if name not in (PADDED, UNPADDED)}
    with torch.no_grad():
        plain, known = (forward(model, each, Capture()).logits for each in (unmarked, batch))
    assert torch.equal(known, plain)
    alone = {name: each for name, each in unmarked.items() if name != "position_ids"}
    with torch.no_grad():
        assert not torch.allclose(forward(model, alone, Capture()).logits, plain)  # documents are told apart


def test_transformers_looks_for_itself_again_after_the_forward_pass(monkeypatch):
    names = ("find_packed_sequence_indices", "_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")
    monkeypatch.setattr(padding, "READS_AT_ONCE", ())
    before = [getattr(masking_utils, name) for name in names]
    batch = mark_padding({"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 3)})
    with pytest.raises(ZeroDivisionError), padding.padding_known(batch, batch):
        assert not any(getattr(masking_utils, name) in before for name in names)
        raise ZeroDivisionError
    assert [getattr(masking_utils, name) for name in names] == before

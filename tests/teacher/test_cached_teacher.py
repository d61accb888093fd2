"""What a cached teacher gives is what the live one gives, for every task, at every position that a loss reads."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from caching import (
    EXACT,
    LAYERS,
    cached,
    chat_project,
    language_project,
    losses_of,
    masked_project,
    numbers_project,
    session_of,
    tags_project,
    trained_project,
)
from embeddings import project as vectors_project
from spans import question_rows, spans_project
from tiny import tiny_project
from two_stacks import speech_project, text_project

from distill.data.batches import collate
from distill.errors import InputError
from distill.evaluation.arms import terms_of
from distill.models.head import OutputHead
from distill.models.topk import TopK
from distill.pipeline import VERBS, cache, run_stages
from distill.pipeline.cached_columns import find_teacher
from distill.pipeline.teachers import load_teaching
from distill.pipeline.train import batches_for, objective_of
from distill.teacher import CachedTeacher
from distill.teacher.cache import read_head, write_head
from distill.teacher.keys import Index, row_keys
from distill.teacher.shards import ShardFolder

CASES = {
    "classes": (tiny_project, [LAYERS]),
    "numbers": (numbers_project, ["losses=[{match: logits, loss: logit_mse}, {match: hidden}]"]),
    "tags": (tags_project, [LAYERS]),
    "answers": (lambda folder: spans_project(folder, question_rows(80)), []),
    "vectors of pairs": (vectors_project, []),
    "packed documents": (language_project, [LAYERS]),
    "chat": (chat_project, [LAYERS]),
    "masked tokens": (masked_project, [LAYERS]),
    "two stacks": (lambda folder: text_project(folder, "bart"), []),
    "speech": (speech_project, ["losses=[{match: logits}, {match: hidden}]"]),
}


@pytest.mark.parametrize("name", CASES)
def test_every_task_gets_from_the_cache_what_the_live_teacher_says(name, tmp_path):
    make, overrides = CASES[name]
    session, _ = cached(tmp_path, make, *overrides, EXACT)
    objective, terms = objective_of(session, "distilled"), terms_of(session.recipe, "distilled")
    kept = find_teacher(session, terms, objective)
    live = session.live_teacher(objective.teacher)
    assert isinstance(kept, CachedTeacher)
    wanted = losses_of(session, live, objective)
    assert wanted.abs().sum(0).min() > 1e-3, "each term has something to compare"
    torch.testing.assert_close(losses_of(session, kept, objective), wanted, rtol=2e-6, atol=1e-6)


def both(session):
    """Objective, the live teacher and the cached one."""
    objective = objective_of(session, "distilled")
    kept = find_teacher(session, terms_of(session.recipe, "distilled"), objective)
    return objective, session.live_teacher(objective.teacher), kept


@pytest.mark.parametrize("make", [language_project, masked_project])
def test_the_likeliest_tokens_come_back_as_they_were_chosen(make, tmp_path):
    session, _ = cached(tmp_path, make, LAYERS, "teacher.cache={keep: topk, k: 5, dtype: fp32}")
    objective, live, kept = both(session)
    for step in batches_for(session, session.recipe.training, labelled=False).stream(0, 2, 0, 1):
        for _, batch in step:
            outputs, found = live(batch), kept(batch)
            assert found.head is None and found.last is None
            mask = objective.kind.predicted(batch)
            rows = objective.kind.predictions(outputs.last, batch)[mask]
            wanted = TopK.of(outputs.head(rows)[:, : session.vocabulary], 5)
            given = objective.kind.predictions(found.logits, batch)[mask]
            assert torch.equal(given.ids, wanted.ids)
            torch.testing.assert_close(given.log_probabilities, wanted.log_probabilities, rtol=0, atol=1e-3)
    states = losses_of(session, live, objective)[:, 2:]
    torch.testing.assert_close(losses_of(session, kept, objective)[:, 2:], states, rtol=2e-6, atol=1e-6)


def test_states_in_bf16_change_the_losses_by_less_than_a_thousandth(tmp_path):
    session, _ = cached(tmp_path, language_project, LAYERS, "teacher.cache={keep: hidden}")
    objective, live, kept = both(session)
    wanted = losses_of(session, live, objective)
    torch.testing.assert_close(losses_of(session, kept, objective), wanted, rtol=1e-3, atol=1e-3)


def test_a_capped_and_scaled_head_with_a_bias_comes_back_whole(tmp_path):
    folder, head = ShardFolder(tmp_path / "own"), OutputHead(torch.randn(9, 4), torch.randn(9), 0.25, cap=30.0)
    write_head(folder, head)
    rows = torch.randn(3, 4)
    assert torch.equal(read_head(folder)(rows), head(rows))


def test_a_row_is_found_in_any_batch_at_any_place_with_any_padding(tmp_path):
    session, _ = cached(tmp_path, language_project, EXACT)
    _, _, kept = both(session)
    corpus = session.corpus
    entry = kept.columns[0].entry
    alone = [kept.add(collate(corpus, corpus.train, [index]))[entry][0] for index in range(6)]
    for order in ([5, 0, 3], [1, 2], [4, 5, 1, 0, 2, 3]):
        together = kept.add(collate(corpus, corpus.train, order, sizes=(40,)))
        for row, index in enumerate(order):
            mask = kept.columns[0].positions(together)[row]
            assert torch.equal(together[entry][row][mask], alone[index][alone[index].abs().sum(-1) > 0])
            assert not together[entry][row][~mask].any()


def test_another_input_is_refused_with_the_reason(tmp_path):
    session, _ = cached(tmp_path, language_project, EXACT)
    _, _, kept = both(session)
    batch = collate(session.corpus, session.corpus.train, [0, 1])
    batch["input_ids"][0, 0] += 1
    with pytest.raises(InputError, match="has nothing for 1 of 2 rows of a batch: the teacher never read them"):
        kept(batch)


def test_the_key_of_a_row_tells_what_is_read_and_what_is_wanted():
    ids, mask = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 8]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    wanted = mask.bool()
    first, second = row_keys(batch, [wanted])
    shorter = {name: tensor[:1, :3] for name, tensor in batch.items()}
    assert (row_keys(shorter, [wanted[:1, :3]]) == first).all() and (first != second).any()
    own = {**batch, "position_ids": torch.arange(4).expand(2, -1)}
    assert (row_keys(own, [wanted])[0] == first).all(), "positions that every text has"
    own["position_ids"] = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 1]])
    for others in (own, {**batch, "token_type_ids": mask}):
        assert (row_keys(others, [wanted])[0] != first).any()
    fewer = wanted.clone()
    fewer[0, 0] = False
    assert (row_keys(batch, [fewer])[0] != first).any()
    fed = [row_keys({**batch, "labels": labels}, [wanted], ("labels",))[0] for labels in (ids, ids + 1, ids - 100)]
    assert len({key.tobytes() for key in fed}) == 3


def test_an_index_finds_rows_and_mistakes_none():
    keys = np.random.default_rng(0).integers(0, 256, (500, 16), np.uint8)
    index = Index(keys)
    chosen = [7, 499, 0, 7]
    assert index.find(keys[chosen]).tolist() == chosen
    near = keys[[3]].copy()
    near[0, 15] ^= 1
    assert index.find(near).tolist() == [-1]


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_teacher_in_8_bits_says_from_the_cache_what_it_says_live(dtype, tmp_path):
    session, _ = session_of(tmp_path, trained_project, LAYERS, EXACT, f"teacher.dtype={dtype}")
    run_stages(session, VERBS["build"])
    cache.work(session)  # the check before it asks for a GPU, which the arithmetic itself does not need
    objective = objective_of(session, "distilled")
    kept = find_teacher(session, terms_of(session.recipe, "distilled"), objective)
    wanted = losses_of(session, load_teaching(session, objective.teacher), objective)
    stored = losses_of(session, session.live_teacher(objective.teacher, whole=True), objective)
    torch.testing.assert_close(losses_of(session, kept, objective), wanted, rtol=2e-6, atol=1e-6)
    assert (wanted - stored).abs().max() > 1e-5


def test_loader_workers_read_the_cache_and_its_damage_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    session, _ = cached(tmp_path, trained_project, LAYERS, EXACT)

    def read(workers):
        batches = batches_for(session, session.recipe.training, labelled=False)
        return list(replace(batches, extend=both(session)[2].add).stream(0, 3, 0, 1, workers))

    for step, other in zip(read(0), read(2), strict=True):
        for (number, batch), (same, found) in zip(step, other, strict=True):
            assert number == same and batch.keys() == found.keys()
            assert all(torch.equal(tensor, found[name]) for name, tensor in batch.items())
    shard = next((tmp_path / "cache/teachers").glob("*/last.fp32/*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError) as caught:
        read(2)
    first = r"\S+ is not what was written: its sha256 is another one; it is removed, .*"
    second = r"\S+: this part of the cached teacher is gone; .*"  # says a worker that comes to it after the first
    assert re.fullmatch(f"{first}|{second}", str(caught.value))


def test_a_reader_is_copied_to_loader_workers_without_its_open_files(tmp_path):
    session, _ = cached(tmp_path, language_project, EXACT)
    _, _, kept = both(session)
    batches = batches_for(session, session.recipe.training, labelled=False)
    ((_, batch),) = next(replace(batches, extend=kept.add, micro_batch_size=8).stream(0, 1, 0, 1))
    copy = pickle.loads(pickle.dumps(kept))
    assert kept._open and not copy._open
    assert torch.equal(copy(batch).last, kept(batch).last)

"""A teacher of which only the most likely tokens and the mass of all others are known, from the loss to the recipe."""

from __future__ import annotations

import inspect
from functools import partial
from math import log
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chunked import Largest
from torch.nn import functional

from distill.errors import InputError, RecipeError
from distill.losses import LOGITS, Objective
from distill.losses.precision import choose_precision, estimate_kl
from distill.losses.slopes import CROSS_ENTROPY, Chunk, Fastest, NamedTerm, Terms, by_autograd
from distill.models.forward import Outputs
from distill.models.head import OutputHead
from distill.models.topk import TopK, with_tail
from distill.recipe import load_recipe
from distill.recipe.schema import Term

B, L, D, V, K = 4, 6, 5, 23, 4
NEVER_MORE = ["forward_kl", "reverse_kl", "symmetric_kl", "jsd", "skew_forward_kl", "skew_reverse_kl",
              "total_variation", "soft_cross_entropy"]  # fmt: skip
"""Divergences that cannot tell more from fewer classes."""


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sample():
    """A student's rows and head, a teacher's likely tokens, and packed, padded batches of unequal texts."""
    rows, weight = draw(B, L, D).requires_grad_(), draw(V, D, seed=1).requires_grad_()
    mask = (torch.arange(L) < torch.tensor([6, 3, 5, 0])[:, None]).long()
    documents = (torch.arange(L) >= 3).long().expand(B, L)
    batch = {"attention_mask": mask, "labels": torch.arange(B * L).view(B, L) % V, "document_ids": documents}
    return rows, weight, TopK.of(draw(B, L, V, seed=2) * 2, K), batch


def learn(objective, cuts=(slice(0, B),), locate=False):
    rows, weight, teacher, batch = sample()
    batches = [{key: value[cut] for key, value in batch.items()} for cut in cuts]
    counts = objective.counts(batches)
    total, sums = torch.zeros(()), torch.zeros(len(objective.names))
    for cut, micro in zip(cuts, batches, strict=True):
        micro_batch = objective.locate(micro) if locate else micro
        own = Outputs(None, last=rows[cut], head=OutputHead(weight))
        loss, found = objective(own, Outputs(teacher[cut]), micro_batch, counts)
        loss.backward()
        total, sums = total + loss.detach(), sums + found
    return [total, sums, rows.grad, weight.grad]


def close(found, expected, limit=2e-6):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= limit * other.norm()


def test_the_objective_is_the_mean_of_the_kl_over_the_tokens_and_their_tail():
    rows, weight, teacher, batch = sample()
    own = (rows @ weight.T).softmax(-1)
    # Position t predicts token t + 1 of the same document: of 6, 3 and 5 real tokens 2 + 2, 2, and 2 + 1 are predicted.
    valid = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 0, 0, 0], [1, 1, 0, 1, 0], [0] * 5]).bool()
    kept = own.gather(-1, teacher.ids)[:, :-1][valid]
    classes = torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)
    target = teacher.log_probabilities[:, :-1][valid].exp()
    kl = (target * (target / classes).log()).sum() / 9
    nll = -own[:, :-1][valid].gather(-1, batch["labels"][:, 1:][valid][:, None]).log().sum() / 9
    expected = kl + 0.3 * nll
    gradients = torch.autograd.grad(expected, [rows, weight])
    objective = Objective([Term(match="logits"), Term(match="labels", weight=0.3)], "next_token", chunk=4)
    close(learn(objective), [expected.detach(), torch.stack([kl, nll]).detach() * 9, *gradients], 1e-5)


def test_every_split_in_micro_batches_gives_the_same_loss_and_gradient():
    for name in LOGITS:
        terms = [Term(match="logits", loss=name, temperature=2.0), Term(match="labels")]
        objective = Objective(terms, "next_token", vocabulary=V, chunk=3)
        whole = learn(objective)
        close(learn(objective, [slice(0, 1), slice(1, 4)]), whole)
        close(learn(objective, locate=True), whole)


def test_no_tensor_holds_all_logits_of_the_student():
    rows, weight = draw(1, 301, 4).requires_grad_(), draw(50, 4, seed=1).requires_grad_()
    teacher = TopK.of(draw(1, 301, 50, seed=2), 3)
    batch = {"attention_mask": torch.ones(1, 301), "labels": torch.zeros(1, 301, dtype=torch.int64)}
    for name in LOGITS:
        objective = Objective([Term(match="labels"), Term(match="logits", loss=name)], "next_token", chunk=20)
        own = Outputs(None, last=rows, head=OutputHead(weight))
        with Largest() as largest:
            objective(own, Outputs(teacher), batch, objective.counts([batch]))[0].backward()
        assert largest.elements <= 301 * 5 < 301 * 50 / 9, name


# The values


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.01, 1.0, 10.0]), k=st.integers(1, V))
def test_the_tokens_and_a_tail_never_tell_more_than_the_vocabulary_and_all_tokens_the_same(seed, scale, k):
    teacher = draw(3, V, seed=seed, dtype=torch.float64) * 3
    student = teacher + scale * draw(3, V, seed=seed + 1, dtype=torch.float64)
    for name in NEVER_MORE:
        whole, part = (LOGITS[name](student, each) for each in (teacher, TopK.of(teacher, k)))
        assert (part <= whole + 1e-9).all(), name
        if k >= V - 1:
            torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-12)


def test_log_probabilities_with_a_tail_have_their_derivative_in_one_pass():
    logits = draw(2, 7, dtype=torch.float64)
    logits[1, 3] = -torch.inf
    for k in (1, 3, 6):
        ids = torch.stack([torch.arange(k)] * 2)
        finite = logits.nan_to_num(neginf=-30.0).requires_grad_()
        assert torch.autograd.gradcheck(partial(with_tail, ids=ids), (finite,)), k
    leaf = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf]]).requires_grad_()
    for ids in (torch.tensor([[0, 1]]), torch.tensor([[0, 1, 2, 3]])):  # a tail without mass, and none at all
        found = with_tail(leaf, ids)
        assert found[0, -1] == -torch.inf
        (slope,) = torch.autograd.grad(found[0, 0], leaf)
        chance = 1 / (1 + torch.e)  # of the first of the two
        assert slope[0].tolist() == pytest.approx([1 - chance, chance - 1, 0, 0])


def test_half_precision_logits_are_widened_and_their_gradient_is_handed_back_as_they_came():
    for dtype in (torch.float16, torch.bfloat16):
        student, teacher = draw(3, V, dtype=dtype).requires_grad_(), TopK.of(draw(3, V, seed=1, dtype=dtype), K)
        value = LOGITS["forward_kl"](student, teacher)
        value.sum().backward()
        assert value.dtype == teacher.log_probabilities.dtype == torch.float32 and student.grad.dtype == dtype


def test_the_tail_is_ranked_after_all_tokens_however_heavy_it_is():
    # The head of 1/4 is the first token. |T - S| = 0.1, 0.1, 0 makes half forward and half reverse KL; with the tail,
    # 0.6 of the teacher, as the head it would be the reverse alone.
    teacher = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.3, 0.1, 0.6]]).log())
    student = torch.tensor([[0.2, 0.2, 0.4, 0.2]]).log()
    forward, reverse = 0.3 * log(1.5) + 0.1 * log(0.5), 0.2 * log(2 / 3) + 0.2 * log(2)
    found = LOGITS["adaptive_kl"](student, teacher, head=0.25).item()
    assert found == pytest.approx((forward + reverse) / 2, rel=1e-5)


# The divergence that is aware of the tail

TEACHER, STUDENT = (
    torch.tensor([[1 / 4, 1 / 8, 1 / 2, 1 / 8]]).log(),
    torch.tensor([[1 / 8, 1 / 8, 1 / 4, 1 / 2]]).log(),
)


def test_it_is_the_kl_of_the_head_and_beta_times_that_of_the_tail():
    # k = 2: tokens 2 and 0, a = 1/4. T/S is 2 and 2 there, and 1/4 over 5/8 for the rest; within the rest T is
    # 1/2, 1/2 and S 1/5, 4/5
    between = 1 / 2 * log(2) + 1 / 4 * log(2) + 1 / 4 * log(2 / 5)
    among = 1 / 2 * log(5 / 2) + 1 / 2 * log(5 / 8)
    for beta in (0.5, 1.0, 3.0):
        found = LOGITS["tail_aware_kl"](STUDENT, TEACHER, k=2, beta=beta).item()
        assert found == pytest.approx(between + beta / 4 * among, rel=1e-5)
    # Of the tokens 2, 0 and 1 and a tail the same are left, as that tail is token 3.
    kept = TopK(torch.tensor([[2, 0, 1]]), torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8]]).log())
    assert LOGITS["tail_aware_kl"](STUDENT, kept, k=2, beta=3.0).item() == pytest.approx(
        between + 3 / 4 * among, rel=1e-5
    )


def test_the_last_class_of_likely_tokens_is_never_one_of_the_head():
    # Token 2 is the head; the tail is token 0 and the class of all others, although that has more than either.
    kept = TopK(torch.tensor([[2, 0]]), torch.tensor([[0.3, 0.1, 0.6]]).log())
    student = torch.tensor([[0.2, 0.3, 0.1, 0.4]]).log()
    between = 0.3 * log(0.3 / 0.1) + 0.7 * log(0.7 / 0.9)
    among = 1 / 7 * log(1 / 7 / (2 / 9)) + 6 / 7 * log(6 / 7 / (7 / 9))
    found = LOGITS["tail_aware_kl"](student, kept, k=1, beta=2.0).item()
    assert found == pytest.approx(between + 2 * 0.7 * among, rel=1e-5)


def test_with_a_beta_of_one_it_is_forward_kl_and_its_gradient_the_derivative():
    student, teacher = draw(5, V, dtype=torch.float64).requires_grad_(), draw(5, V, seed=1, dtype=torch.float64)
    for target in (teacher, TopK.of(teacher, 12)):
        for temperature in (1.0, 2.0):
            one, other = (
                LOGITS[name](student, target, temperature=temperature, **params)
                for name, params in {"tail_aware_kl": {"k": 10, "beta": 1.0}, "forward_kl": {}}.items()
            )
            torch.testing.assert_close(one, other)
        loss = partial(LOGITS["tail_aware_kl"], teacher_logits=target, k=5, beta=4.0, temperature=1.5)
        assert torch.autograd.gradcheck(loss, (student,))


@pytest.mark.parametrize(
    ("k", "beta", "message"),
    [(0, 2.0, "k must be from 1 to 2"), (3, 2.0, "k must be from 1 to 2"), (1, 0.0, "beta must be above 0, got 0")],
)
def test_a_tail_that_is_none_is_refused(k, beta, message):
    for target in (TEACHER, TopK.of(TEACHER, 3)):
        with pytest.raises(ValueError, match=message):
            LOGITS["tail_aware_kl"](STUDENT, target, k=k, beta=beta)


def test_as_many_tokens_as_a_trial_has_columns_are_no_mistake():
    Objective([Term(match="logits", loss="tail_aware_kl", params={"k": 64})], "next_token")


def test_a_head_of_classes_has_no_tail():
    with pytest.raises(InputError, match="for vocabularies"):
        Objective([Term(match="logits", loss="tail_aware_kl")], "sequence")


# The methods of computing it


def compiled_and_by_autograd(names, key):
    """Sums and slope by both, for chunks of different lengths, and who said what."""

    def sums(own, teacher, labels):
        losses = [LOGITS[name](own, teacher, temperature=2.0).sum() for name in names]
        return torch.stack([*losses, functional.cross_entropy(own, labels, reduction="sum")])

    named = [NamedTerm(name, 1.0, {"temperature": 2.0}) for name in names]
    terms = Terms(sums, [*named, NamedTerm(CROSS_ENTROPY)], None, key)
    fastest, factors = Fastest(devices=("cpu",), backend="aot_eager"), torch.linspace(0.1, 0.4, len(names) + 1)
    for rows in (6, 3):
        given = [TopK.of(draw(rows, V, seed=1), K), torch.arange(rows), 5.0, torch.float32]
        close(*(method(Chunk(draw(rows, V), *given), terms, factors) for method in (fastest, by_autograd)))
    return fastest


def test_likely_tokens_are_compiled_with_the_loss_and_not_left_to_something_slower():
    fastest = compiled_and_by_autograd(["forward_kl", "adaptive_kl", "tail_aware_kl"], "key")
    assert not fastest.notices and len(fastest._compiled) == 1


def test_terms_that_change_from_step_to_step_are_computed_more_slowly_and_that_is_said_once():
    fastest = compiled_and_by_autograd(["forward_kl"], None)
    assert fastest.notices == ["the loss on logits follows a schedule and is not compiled, but computed more slowly"]


def squared(student, teacher, *, temperature=1.0):
    return ((student - teacher) / temperature).clamp(-50, 50).square().mean(-1)


def test_a_loss_of_ones_own_gets_the_tokens_and_the_tail_as_classes():
    objective = Objective([Term(match="logits", loss="test_likely_tokens:squared")], "next_token", vocabulary=V)
    rows, weight, teacher, _ = sample()
    valid = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 0, 0, 0], [1, 1, 0, 1, 0], [0] * 5]).bool()
    own = with_tail(rows @ weight.T, teacher.ids)[:, :-1][valid]
    expected = squared(own, teacher.log_probabilities[:, :-1][valid]).sum() / 9
    close(learn(objective)[:1], [expected.detach()], 1e-5)


def test_the_operands_of_the_head_are_never_coarser_than_the_whole_vocabulary_would_have_them():
    order = ["fp32", "tf32", "bf16"]
    for distance in (0.01, 0.03, 0.1, 0.3):
        teacher = draw(200, 400)
        student = teacher + distance * draw(200, 400, seed=1)
        whole = choose_precision(LOGITS["forward_kl"](student, teacher).mean().item())
        for name in set(NEVER_MORE) - {"total_variation", "soft_cross_entropy"} | {"tail_aware_kl"}:
            part = estimate_kl(name, LOGITS[name](student, TopK.of(teacher, 64)).mean().item(), {})
            assert order.index(choose_precision(part)) <= order.index(whole), name


# The recipe


SOMEWHERE_ELSE = ["teacher.model=org/some-model", "teacher.revision=abc", "teacher.sha256=null"]
"""The teacher of the recipe is in a package that need not be there."""
LANGUAGE_MODEL = Path(__file__).parents[2] / "recipes/smollm2-text/recipe.yaml"


def load_with(loss, cache):
    return load_recipe(
        LANGUAGE_MODEL,
        [*SOMEWHERE_ELSE, f"losses=[{{match: labels}}, {{match: logits, {loss}}}]", f"teacher.cache={cache}"],
    )


@pytest.mark.parametrize(
    ("loss", "cache", "words"),
    [
        ("loss: logit_mse", "{keep: topk}", ["logit_mse compares logits", "write keep: hidden, or loss: forward_kl"]),
        ("loss: tail_aware_kl, params: {k: 10}", "{keep: topk, k: 10}", ["its k of 10", "a teacher.cache.k above 10"]),
        ("loss: tail_aware_kl", "{keep: topk, k: 1}", ["its k of 1", "a teacher.cache.k above 1"]),
    ],
)
def test_what_likely_tokens_are_not_enough_for_is_refused_before_anything_is_run(loss, cache, words):
    with pytest.raises(RecipeError) as refused:
        load_with(loss, cache)
    (problem,) = refused.value.problems
    assert problem.key == "losses.1.loss" and all(each in str(problem) for each in words)


def test_likely_tokens_are_enough_for_every_other_loss_and_hidden_states_for_all():
    for name in sorted(set(LOGITS) - {"logit_mse"}):
        load_with(f"loss: {name}", "{keep: topk}")
    load_with("loss: tail_aware_kl, params: {k: 10}", "{keep: topk, k: 11}")
    load_with("loss: logit_mse", "{keep: hidden}")


def test_the_recipe_knows_the_default_of_the_head():
    assert inspect.signature(LOGITS["tail_aware_kl"]).parameters["k"].default == 1

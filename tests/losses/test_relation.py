"""Attention maps and Q/K/V relations: numbers by hand, and what is captured of each family."""

from dataclasses import replace
from math import exp, log

import pytest
import torch
from language_models import FAMILIES, SEQ2SEQ, language_model
from tiny import tiny_batch, tiny_inputs, tiny_model

from distill.errors import InputError
from distill.losses import ATTENTION, RELATION, LayerMap, Objective
from distill.models.attention import relation_widths
from distill.models.family import use_eager_attention
from distill.models.forward import Capture, Outputs, forward
from distill.models.layout import LAYOUTS
from distill.recipe.schema import Term

VISIBLE = torch.ones(1, 2, 2, dtype=torch.bool)
# one head, two positions; only the first row differs
STUDENT = torch.tensor([[[[1 / 4, 3 / 4], [1 / 2, 1 / 2]]]])
TEACHER = torch.tensor([[[[1 / 2, 1 / 2], [1 / 2, 1 / 2]]]])


def test_attention_distances_by_hand():
    assert ATTENTION["mse"](STUDENT, TEACHER, VISIBLE).tolist() == [[pytest.approx(1 / 16), 0]]
    expected = (log(2) + log(2 / 3)) / 2  # 1/2 log(1/2 / 1/4) + 1/2 log(1/2 / 3/4)
    assert ATTENTION["kl"](STUDENT, TEACHER, VISIBLE).tolist() == [[pytest.approx(expected, rel=1e-6), 0]]


def test_a_relation_by_hand():
    # vectors (1), (2) against (0), (0): rows of the products (1, 2), (2, 4) against a uniform teacher
    student, teacher = torch.tensor([[[1.0], [2.0]]]), torch.zeros(1, 2, 1)
    found = RELATION["values"]([student] * 3, [teacher] * 3, VISIBLE)
    for row, (a, b) in zip(found[0], [(1, 2), (2, 4)], strict=True):
        total = exp(a) + exp(b)
        assert row.item() == pytest.approx(-log(2) - (log(exp(a) / total) + log(exp(b) / total)) / 2, rel=1e-5)
    torch.testing.assert_close(RELATION["qkv"]([student] * 3, [teacher] * 3, VISIBLE), found)


@pytest.mark.parametrize("name", RELATION)
def test_relations_scale_by_their_head_and_do_not_need_equal_widths(name):
    draw = torch.Generator().manual_seed(0)
    own, target = ([torch.randn(2, 3, width, generator=draw) for _ in range(3)] for width in (4, 12))
    visible = torch.ones(2, 3, 3, dtype=torch.bool).tril()
    found = RELATION[name](own, target, visible, heads=2)

    def logs(vectors, head):
        part = vectors.chunk(2, -1)[head]
        scores = (part @ part.mT / part.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
        return scores.softmax(-1)

    kinds = range(3) if name == "qkv" else [2]
    expected = sum(
        torch.special.xlogy(t, t / s).nan_to_num(0).sum(-1) / 2 / len(kinds)
        for kind in kinds for head in (0, 1)
        for s, t in [(logs(own[kind], head), logs(target[kind], head))]
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="5 relation heads"):
        RELATION[name](own, target, visible, heads=5)


@pytest.mark.parametrize("visible", [VISIBLE, VISIBLE.tril(), ~VISIBLE])
def test_gradients_are_derivatives_whatever_is_visible(visible):
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 1, 3, 2, 2, generator=draw, dtype=torch.float64).masked_fill(~visible[:, None], -1e9)
    student, teacher = scores.softmax(-1)
    student.requires_grad_()
    for function in ATTENTION.values():
        value = function(student, teacher, visible)
        value.sum().backward()
        assert value.isfinite().all() and student.grad.isfinite().all()
    vectors = [torch.randn(1, 2, 4, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(6)]
    for function in RELATION.values():
        assert torch.autograd.gradcheck(lambda *v, f=function: f(v[:3], v[3:], visible, heads=2), vectors)
    for function in ATTENTION.values():
        logits = [vector @ vector.mT for vector in vectors[:2]]
        maps = [each.softmax(-1)[:, None].detach().requires_grad_() for each in logits]
        assert torch.autograd.gradcheck(lambda own, f=function, m=maps: f(own, m[1].detach(), VISIBLE), (maps[0],))


def test_maps_of_another_number_of_heads_are_refused():
    with pytest.raises(ValueError, match="match relations"):
        ATTENTION["kl"](STUDENT, TEACHER.expand(1, 2, 2, 2), VISIBLE)


@pytest.mark.parametrize(
    ("kind", "visible"),
    [
        # The second text has one token less than the first; a query of a causal model sees no key after itself.
        ("sequence", [[[1, 1, 1], [1, 1, 1], [1, 1, 1]], [[1, 1, 0], [1, 1, 0], [0, 0, 0]]]),
        ("next_token", [[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0], [0, 0, 0]]]),
        ("documents", [[[1, 0, 0], [0, 1, 1], [0, 1, 1]], [[1, 0, 0], [0, 1, 0], [0, 0, 0]]]),
    ],
)
def test_a_term_compares_what_real_tokens_attend_to(kind, visible):
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 3, 2, 3, 4, generator=draw)
    maps = torch.randn(2, 2, 1, 3, 3, generator=draw).softmax(-1)
    sides = [
        Outputs(torch.zeros(2, 4), attention={0: m}, relations={0: [*v]}) for v, m in zip(vectors, maps, strict=True)
    ]
    batch = {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]), "labels": torch.zeros(2, dtype=torch.int64)}
    if kind == "documents":
        kind, batch["document_ids"] = "sequence", torch.tensor([[0, 1, 1], [0, 1, 1]])
    terms = [Term(match="attention"), Term(match="attention", loss="mse"), Term(match="relations")]
    visible, real = torch.tensor(visible).bool(), batch["attention_mask"].bool()
    if kind == "next_token":
        sides = [replace(side, logits=torch.zeros(2, 3, 4)) for side in sides]
        batch["labels"] = torch.zeros(2, 3, dtype=torch.int64)
    objective = Objective(terms, kind, lambda _policy: LayerMap(((0, 0),)))
    _, sums = objective(*sides, batch, objective.counts([batch]))
    expected = [ATTENTION[name](*maps, visible)[real].sum() for name in ("kl", "mse")]
    expected.append(RELATION["qkv"](*vectors, visible)[real].sum())
    torch.testing.assert_close(sums, torch.stack(expected))


def test_every_family_has_its_attention():
    assert all(layout.stack(side).attention for layout in LAYOUTS.values() for side in layout.sides)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_maps_and_relations_of_every_family_are_captured(family):
    model, batch = language_model(family), tiny_batch(padded=False)
    if family in SEQ2SEQ:
        batch["decoder_input_ids"] = tiny_batch(seed=1, padded=False)["input_ids"]
    use_eager_attention(model)
    if family == "deberta-v2":
        with pytest.raises(InputError, match="DeBERTa never does"):
            forward(model, batch, Capture(attention=[1]))
    attention = [] if family == "deberta-v2" else [1]
    found = forward(model, batch, Capture(relations=[0, 1], attention=attention, stop_at_head=True))
    maps = found.attention.get(1, torch.full((3, 4, 10, 10), 0.1))
    assert maps.shape == (3, 4, 10, 10) and torch.allclose(maps.sum(-1), torch.ones(3, 4, 10), atol=1e-5)
    queries, keys, values = found.relations[1]
    assert [part.shape[-1] for part in found.relations[1]] == relation_widths(model, 1)
    assert queries.shape[:2] == keys.shape[:2] == values.shape[:2] == (3, 10)
    assert keys.shape == values.shape and queries.shape[-1] % keys.shape[-1] == 0


@torch.no_grad()
def test_columns_made_by_one_module_are_told_apart():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=2))
    fused = model.gpt_neox.layers[0].attention.query_key_value
    # Per head: 4 rows of queries, then 4 of keys, then 4 of values; give each its own constant.
    fused.weight.zero_()
    fused.bias.copy_(torch.tensor([0.0, 1.0, 2.0]).repeat_interleave(4).repeat(2))
    found = forward(model, tiny_batch(padded=False), Capture(relations=[0])).relations[0]
    assert [part.unique().tolist() for part in found] == [[0], [1], [2]]


@pytest.mark.parametrize("family", ["llama", "t5"])  # T5 hands out its biases, which are no probabilities
def test_attention_that_keeps_no_probabilities_is_an_error_with_the_fix(family):
    model = tiny_model(family)
    model.set_attn_implementation("sdpa")
    with pytest.raises(InputError, match="eager"):
        forward(model, tiny_inputs(model), Capture(attention=[0]))

"""The Triton kernels, run by Triton's interpreter, against float64; and compiled for a GPU that is not there."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from distill.losses import LOGITS, Objective
from distill.losses.chunked import HeadInput, through_heads
from distill.losses.slopes import (
    CROSS_ENTROPY,
    KERNEL_CODES,
    LIMITS,
    Chunk,
    Fastest,
    NamedTerm,
    Terms,
    by_autograd,
    by_kernel,
    fits_kernel,
    trial,
)
from distill.models.forward import Outputs
from distill.models.head import OutputHead
from distill.recipe.schema import Term

pytest.importorskip("triton")
# Of the numbers in lanes that hold nothing; the interpreter computes with numpy.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):RuntimeWarning")

N, V, REAL = 5, 2100, 2090  # more than one block, and not a multiple of it; the last columns are padding
AMOUNTS = {"jsd": ("beta", 0.3), "skew_forward_kl": ("alpha", 0.2), "skew_reverse_kl": ("alpha", 0.3)}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def params_of(name, temperature, amount=None):
    key, default = AMOUNTS.get(name, (None, None))
    return {"temperature": temperature} | ({key: default if amount is None else amount} if key else {})


def exact(name, params, chunk, factors, scale):
    """Values and slope in float64: the divergence over the real columns, the cross-entropy over all."""
    leaf = chunk.linear.double().requires_grad_()
    own = leaf if chunk.cap is None else chunk.cap * torch.tanh(leaf / chunk.cap)
    divergence = scale * LOGITS[name](own[:, :REAL], chunk.teacher[:, :REAL].double(), **params).sum()
    nll = functional.cross_entropy(own, chunk.labels, reduction="sum")
    (factors[0] * divergence + factors[1] * nll).backward()
    return torch.stack([divergence, nll]).detach(), leaf.grad


def far(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("near", "product"), [(0.05, torch.float32), (1.0, torch.bfloat16)], ids=["near", "far, bf16"])
@pytest.mark.parametrize("name", KERNEL_CODES)
def test_values_and_slopes_are_those_of_float64(name, product, near):
    cap, temperature = (None, 1.7) if product == torch.float32 else (4.0, 0.8)
    teacher = 2 * draw(N, V + 7)
    labels = torch.tensor([0, -100, REAL - 1, 7, 2050])
    padded = torch.full((N, V + 12), 7.0)  # rows of a buffer are longer than the vocabulary
    padded[:, :V] = teacher[:, :V] + near * draw(N, V, seed=1)
    chunk = Chunk(padded[:, :V], teacher, labels, cap, product)
    params, scale = params_of(name, temperature), temperature**2
    factors = torch.tensor([0.3, 0.05])
    expected = exact(name, params, chunk, factors, scale)
    terms = Terms(None, [NamedTerm(name, scale, params), NamedTerm(CROSS_ENTROPY)], REAL)
    sums, slope = by_kernel(chunk, terms, factors)
    assert slope.dtype == product and slope.data_ptr() == padded.data_ptr()
    # Near the teacher a plain divergence is the small difference of its terms.
    assert far(sums, expected[0]) < (1e-3 if near < 1 else 1e-5)
    assert far(slope, expected[1]) < (1e-5 if product == torch.float32 else 5e-3)
    assert padded[:, V:].eq(7).all() or product == torch.bfloat16


@pytest.mark.parametrize(("name", "amount"), LIMITS)
def test_the_limits_of_mixtures_are_plain_divergences(name, amount):
    terms = Terms(None, [NamedTerm(name, 1.0, params_of(name, 1.0, amount))])
    plain = Terms(None, [NamedTerm(LIMITS[name, amount], 1.0, {"temperature": 1.0})])
    made = [by_kernel(Chunk(draw(N, 90), draw(N, 90, seed=1), torch.zeros(N).long(), None, torch.float32), each,
                      torch.ones(1)) for each in (terms, plain)]  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip(*made, strict=True))


def test_cross_entropy_alone_needs_no_teacher():
    logits, labels = draw(N, V), torch.tensor([0, -100, V - 1, 7, 2050])
    leaf = logits.double().requires_grad_()
    loss = functional.cross_entropy(leaf, labels, reduction="sum")
    (0.5 * loss).backward()
    chunk = Chunk(logits.clone(), None, labels, None, torch.float32)
    sums, slope = by_kernel(chunk, Terms(None, [NamedTerm(CROSS_ENTROPY)]), torch.tensor([0.5]))
    assert far(sums, loss.detach()[None]) < 1e-6 and far(slope, leaf.grad) < 1e-6


def test_forbidden_classes_add_nothing_and_nan_is_not_hidden():
    student, teacher = draw(2, 50), draw(2, 50, seed=1)
    student[0, 3] = teacher[0, 3] = -torch.inf
    student[1, 4] = torch.nan
    expected = LOGITS["forward_kl"](student[:1].double(), teacher[:1].double())
    chunk = Chunk(student, teacher, torch.zeros(2).long(), None, torch.float32)
    for name in KERNEL_CODES:
        terms = Terms(None, [NamedTerm(name, 1.0, params_of(name, 1.0))])
        sums, slope = by_kernel(replace(chunk, linear=student.clone()), terms, torch.ones(1))
        assert sums.isnan().all() and slope[1].isnan().any() and slope[0].isfinite().all() and slope[0, 3] == 0, name
    first = Chunk(student[:1].clone(), teacher[:1], torch.zeros(1).long(), None, torch.float32)
    terms = Terms(None, [NamedTerm("forward_kl", 1.0, {"temperature": 1.0})])
    assert far(by_kernel(first, terms, torch.ones(1))[0], expected) < 1e-5


def learn(method, *, terms, cap=None, size=7):
    """Loss, sums and gradients of the objective's own terms through a pair of heads, by one method."""
    width, positions, vocabulary = 12, 20, 130
    rows, weight = draw(positions, width).requires_grad_(), draw(vocabulary, width, seed=1).requires_grad_()
    student = HeadInput(rows, OutputHead(weight, cap=cap))
    teacher = HeadInput(draw(positions, 9, seed=2), OutputHead(draw(vocabulary + 3, 9, seed=3)))
    labels = torch.arange(positions) % vocabulary
    made = []
    objective = Objective(terms, "next_token", vocabulary=vocabulary - 4)
    objective._slopes = lambda chunk, terms, factors: made.append(terms) or by_autograd(chunk, terms, factors)
    outputs = [Outputs(None, {}, side.rows[None], side.head) for side in (student, teacher)]
    batch = {"attention_mask": torch.ones(1, positions), "labels": labels[None]}
    objective(*outputs, batch, objective.counts([batch]))
    loss, sums = through_heads(student, teacher, labels, made[0], torch.tensor([0.4, 0.2])[: len(terms)], size, method)
    loss.backward()
    return [loss.detach(), sums, rows.grad, weight.grad]


BOTH = [Term(match="labels"), Term(match="logits", loss="jsd", temperature=2.0, params={"beta": 0.3})]
OWN = [Term(match="logits", loss="test_chunked:cubed", temperature=2.0)]
SEVERAL = [Term(match="logits"), Term(match="logits", loss="reverse_kl")]


@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_objective_hands_its_terms_to_the_kernel(cap):
    fastest = Fastest(devices=("cpu",))
    found, expected = (learn(method, terms=BOTH, cap=cap) for method in (fastest, by_autograd))
    assert not fastest.notices and [key[0] for key in fastest._trusted] == ["kernel"]
    for one, other in zip(found, expected, strict=True):
        assert far(one, other.double()) < 1e-5


@pytest.mark.parametrize("terms", [OWN, SEVERAL], ids=["a user's own", "several"])
def test_what_no_kernel_knows_is_compiled_with_its_gradient(terms):
    fastest = Fastest(devices=("cpu",), backend="aot_eager")
    found, expected = (learn(method, terms=terms, cap=3.0) for method in (fastest, by_autograd))
    assert not fastest.notices and len(fastest._compiled) == 1 and not fastest._trusted
    for one, other in zip(found, expected, strict=True):
        assert far(one, other.double()) < 1e-5


def branches(student, teacher, *, temperature=1.0):
    """Decides by a value, which cannot be traced."""
    return (student - teacher).square().mean(-1) if student.sum() > 1e9 else (student - teacher).abs().mean(-1)


def test_what_cannot_be_traced_is_left_to_autograd_and_said_once():
    terms = [Term(match="logits", loss="test_kernels:branches")]
    fastest = Fastest(devices=("cpu",))
    found, expected = (learn(method, terms=terms) for method in (fastest, by_autograd))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert len(fastest.notices) == 1 and "by compiled code" in fastest.notices[0]


def test_a_kernel_that_is_off_is_not_used(monkeypatch):
    def wrong(chunk, terms, factors):
        sums, slope = by_kernel(chunk, terms, factors)
        return sums, slope.mul_(1.01)

    wrong.__name__ = "by_kernel"
    monkeypatch.setattr("distill.losses.slopes.by_kernel", wrong)
    fastest = Fastest(devices=("cpu",), backend="aot_eager")
    found, expected = (learn(method, terms=BOTH) for method in (fastest, by_autograd))
    for one, other in zip(found, expected, strict=True):
        assert far(one, other.double()) < 1e-5
    assert len(fastest.notices) == 1 and "off" in fastest.notices[0]


def test_a_kernel_is_tried_again_where_memory_was_too_small_for_its_trial(monkeypatch):
    tried = []

    def too_large(*given):
        tried.append(given)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("not enough")
        return trial(*given)

    monkeypatch.setattr("distill.losses.slopes.trial", too_large)
    fastest = Fastest(devices=("cpu",))
    with pytest.raises(torch.OutOfMemoryError):
        learn(fastest, terms=BOTH)
    learn(fastest, terms=BOTH)
    assert len(tried) == 2


def test_terms_that_follow_a_schedule_are_never_compiled():
    schedule = {"temperature": 4.0}
    objective = Objective([Term(match="logits", loss="logit_mse", schedule=schedule)], "next_token")
    keys = []
    objective._slopes = lambda chunk, terms, factors: keys.append(terms.key) or by_autograd(chunk, terms, factors)
    side = Outputs(None, {}, draw(1, 4, 3).requires_grad_(), OutputHead(draw(9, 3)))
    batch = {"attention_mask": torch.ones(1, 4), "labels": torch.zeros(1, 4).long()}
    objective(side, side, batch, objective.counts([batch]), progress=0.5)
    assert keys == [None]


@pytest.mark.parametrize(
    ("names", "fits"),
    [
        (["forward_kl"], True), (["forward_kl", CROSS_ENTROPY], True), ([CROSS_ENTROPY], True), ([], False),
        (["forward_kl", "jsd"], False), (["logit_mse"], False), ([""], False), (["adaptive_kl"], False),
    ],
)  # fmt: skip
def test_the_kernel_takes_one_divergence_and_labels(names, fits):
    chunk = Chunk(draw(2, 9), draw(2, 9), torch.zeros(2).long(), None, torch.float32)
    terms = Terms(None, [NamedTerm(name) for name in names])
    assert fits_kernel(chunk, terms) is fits
    assert not fits_kernel(replace(chunk, linear=chunk.linear.double()), terms)


def test_on_fake_tensors_only_memory_is_counted():
    fastest = Fastest(devices=("cpu",))
    with FakeTensorMode():
        chunk = Chunk(torch.empty(4, 90), torch.empty(4, 90), torch.zeros(4).long(), None, torch.bfloat16)
        terms = Terms(None, [NamedTerm("jsd", 1.0, {"temperature": 1.0})])
        sums, slope = fastest(chunk, terms, torch.ones(1))
    assert slope.shape == (4, 90) and slope.dtype == torch.bfloat16 and sums.shape == (1,) and not fastest._trusted


def test_a_trial_sees_a_wrong_sign():
    chunk = Chunk(draw(2, 90), draw(2, 90), torch.zeros(2).long(), None, torch.float32)
    terms = Terms(lambda own, teacher, _: LOGITS["jsd"](own, teacher).sum()[None],
                  [NamedTerm("jsd", 1.0, {"temperature": 1.0})])  # fmt: skip
    assert trial(chunk, terms, by_kernel) < 1e-5
    flipped = replace(terms, sums=lambda *given: -terms.sums(*given))
    assert trial(chunk, flipped, by_kernel) > 1


FOR_A_GPU = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from distill.losses import kernels

names = list(kernels._row.arg_names)
flags = ("DIVERGENCE", "LABELS", "CAPPED", "ONE_SUM", "BLOCK")
kinds = {"labels": "*i64"} | dict.fromkeys(flags, "constexpr")
kinds |= dict.fromkeys(("student", "teacher", "values", "factor", "label_factor"), "*fp32")
kinds |= dict.fromkeys(("inverse", "scale", "amount", "cap"), "fp32")
for chosen, slope, card in (
    ((1, 1, 0, 1), "bf16", 90), ((4, 1, 1, 0), "bf16", 90), ((6, 0, 0, 0), "fp32", 80), ((0, 1, 0, 0), "bf16", 100),
):
    places = {(names.index(name),): value for name, value in zip(flags, (*chosen, kernels.BLOCK))}
    signature = {name: kinds.get(name, "i32") for name in names} | {"slope": f"*{slope}"}
    source = ASTSource(kernels._row, signature=signature, constexprs=places)
    triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": kernels.WARPS})
"""


def test_the_kernel_compiles_for_gpus(tmp_path):
    """Triton and its assembler need no GPU for that; the interpreter takes much that the compiler refuses."""
    plain = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FOR_A_GPU], env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_on_a_gpu_every_kernel_agrees_with_autograd(product):
    logits, teacher = draw(N, 50_000).cuda(), draw(N, 50_003, seed=1).cuda()
    for name in KERNEL_CODES:
        objective = Objective([Term(match="labels"), Term(match="logits", loss=name, temperature=2.0)], "next_token")
        labelled, divergence = objective._at(0.0)
        sums = lambda own, theirs, labels, one=labelled, other=divergence: torch.stack(  # noqa: E731
            [each.total(own, theirs, labels, slice(None)) for each in (one, other)]
        )
        chunk = Chunk(logits, teacher, torch.zeros(N, device="cuda").long(), None, product)
        limit = 1e-4 if product == torch.float32 else 1e-2
        assert trial(chunk, Terms(sums, [labelled.named, divergence.named]), by_kernel) < limit, name


@pytest.mark.gpu
def test_on_a_gpu_the_objective_takes_the_kernel():
    rows, weight = draw(20, 64).cuda().requires_grad_(), draw(3000, 64, seed=1).cuda().requires_grad_()
    objective = Objective(BOTH, "next_token")
    student = Outputs(None, {}, rows[None], OutputHead(weight))
    teacher = Outputs(None, {}, draw(1, 20, 64, seed=2).cuda(), OutputHead(draw(3000, 64, seed=3).cuda()))
    batch = {"attention_mask": torch.ones(1, 20).cuda(), "labels": torch.zeros(1, 20).long().cuda()}
    with torch.autocast("cuda", torch.bfloat16):
        objective(student, teacher, batch, objective.counts([batch]))[0].backward()
    assert not objective.notices() and [key[0] for key in objective._slopes._trusted] == ["kernel"]
    assert rows.grad.isfinite().all() and weight.grad.ne(0).any()

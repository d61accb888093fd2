"""A chunk of logits in, the sums of the terms and their slope out, by the fastest method that works.

The slope is the derivative of the loss by the student's logits, of which only the chunk's are ever there. Three methods
compute it. On a GPU a Triton kernel takes one of the common divergences and the cross-entropy with labels; anything
else, a user's own function too, is traced together with its gradient and compiled. On a CPU, and where neither works,
autograd differentiates the loss block by block. All give the same; the tests compare.

n positions, V vocabulary, K terms.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from distill.losses.logits import LOGITS
from distill.models.head import soft_cap
from distill.models.topk import TopK

SumTerms = Callable[[Tensor, Any, Tensor], Tensor]
"""(student's logits [n, V], teacher's [n, V'] or None, labels [n]) -> sum of each term over these positions, [K]."""

CROSS_ENTROPY = "cross_entropy"
BLOCK = {"cpu": 2**18, "cuda": 2**28}
"""Logits that autograd differentiates the loss on at once: on a CPU, what stays in its cache."""
AGREEMENT = 1e-4
"""Relative distance from autograd, beside the rounding of the slope, beyond which a kernel is not trusted."""
KERNEL_CODES = {
    "forward_kl": "FORWARD",
    "reverse_kl": "REVERSE",
    "symmetric_kl": "SYMMETRIC",
    "jsd": "JSD",
    "skew_forward_kl": "SKEW_FORWARD",
    "skew_reverse_kl": "SKEW_REVERSE",
    "total_variation": "VARIATION",
    "soft_cross_entropy": "SOFT",
}
"""Divergence -> its code in `distill.losses.kernels`."""
LIMITS = {
    ("jsd", 0.0): "forward_kl",
    ("jsd", 1.0): "reverse_kl",
    ("skew_forward_kl", 0.0): "forward_kl",
    ("skew_reverse_kl", 0.0): "reverse_kl",
}
"""(divergence, its beta or alpha) -> the divergence that it is there."""


@dataclass(frozen=True)
class NamedTerm:
    """A term by name, for a kernel."""

    name: str
    """A name of `LOGITS`, `CROSS_ENTROPY`, or another one, which no kernel knows."""
    scale: float = 1.0
    """Factor on its values: temperature² or 1."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Its keyword arguments, temperature included."""

    def amount(self) -> float:
        """Return the divergence's own parameter, beta or alpha; 0 where it has none."""
        own = inspect.signature(LOGITS[self.name]).parameters
        return next((float(self.params.get(key, own[key].default)) for key in ("beta", "alpha") if key in own), 0.0)


@dataclass(frozen=True)
class Terms:
    """The terms on logits at one step of the training."""

    sums: SumTerms
    """Differentiated by autograd, so it must not change its arguments in place."""
    named: Sequence[NamedTerm] = ()
    """The same terms by name; empty: not known."""
    classes: int | None = None
    """Columns that divergences compare; None: all that both sides have."""
    key: Any = None
    """Stands for what `sums` computes, so that it is compiled once; None where it changes from step to step."""


@dataclass(frozen=True)
class Chunk:
    """The logits of some positions, before the student's cap."""

    linear: Tensor
    """The student's, [n, V], in a buffer that the slope may be written over."""
    teacher: Any
    """[n, V'], a `TopK`, or None."""
    labels: Tensor
    """int64 [n]."""
    cap: float | None
    product: torch.dtype
    """The dtype in which products with the slope are taken."""


SlopeMethod = Callable[[Chunk, Terms, Tensor], tuple[Tensor, Tensor]]
"""(chunk, terms, factor of each sum in the loss [K]) -> sums [K], slope [n, V]; the logits are gone."""


def blocks(linear: Tensor) -> Iterator[slice]:
    """Cut the positions of a chunk into blocks on which autograd, or a user's own function, runs at once."""
    step = max(1, BLOCK.get(linear.device.type, BLOCK["cuda"]) // linear.shape[-1])
    yield from (slice(start, start + step) for start in range(0, len(linear), step))


@torch.enable_grad()
def by_autograd(chunk: Chunk, terms: Terms, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate the loss block by block; the slope is written over the logits."""
    linear = chunk.linear
    total = torch.zeros(len(factors), dtype=torch.float64, device=linear.device)
    for block in blocks(linear):
        leaf = linear[block].detach().requires_grad_()
        teacher = None if chunk.teacher is None else chunk.teacher[block]
        sums = terms.sums(soft_cap(leaf, chunk.cap), teacher, chunk.labels[block])
        (slope,) = torch.autograd.grad((factors * sums).sum(), leaf)
        linear[block] = slope  # in place of the logits
        total += sums.detach()
    return total, linear


def by_kernel(chunk: Chunk, terms: Terms, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Let the Triton kernel write the slope over the logits, in the dtype of the products."""
    from distill.losses import kernels  # Triton comes with torch's builds for GPUs

    linear, teacher = chunk.linear, chunk.teacher
    columns = linear.shape[-1]
    slope = linear if chunk.product == linear.dtype else linear.view(chunk.product)[:, :columns]
    work = kernels.Work()
    for term, factor in zip(terms.named, factors, strict=True):
        if term.name == CROSS_ENTROPY:
            work = replace(work, label_factor=factor)
            continue
        amount = term.amount()
        code = getattr(kernels, KERNEL_CODES[LIMITS.get((term.name, amount), term.name)])
        temperature = term.params["temperature"]
        work = replace(work, divergence=code, factor=factor, temperature=temperature, scale=term.scale, amount=amount)
    compared = min(columns, columns if teacher is None else teacher.shape[-1], terms.classes or columns)
    values = kernels.write_slopes(linear, teacher, chunk.labels, slope, compared, chunk.cap, work)
    divergence, nll = values.sum(0, dtype=torch.float64).unbind()
    return torch.stack([nll if term.name == CROSS_ENTROPY else term.scale * divergence for term in terms.named]), slope


def fits_kernel(chunk: Chunk, terms: Terms) -> bool:
    """Tell whether the kernel computes these terms on fp32 logits: at most one divergence that it knows, and labels."""
    sides = [chunk.linear] if chunk.teacher is None else [chunk.linear, chunk.teacher]
    if not all(isinstance(side, Tensor) and side.dtype == torch.float32 for side in sides):
        return False
    divergences = [term.name for term in terms.named if term.name != CROSS_ENTROPY]
    known = all(name in KERNEL_CODES for name in divergences)
    sizes = bool(terms.named) and len(divergences) <= 1 and len(terms.named) - len(divergences) <= 1
    return known and sizes and importlib.util.find_spec("triton") is not None


class Fastest:
    """The fastest method that works: kernel, compiled, autograd; says once why one is left out."""

    def __init__(self, devices: Sequence[str] = ("cuda",), backend: str = "inductor") -> None:
        """Take nothing for granted yet.

        Args:
            devices: Types of devices on which more than autograd is tried.
            backend: Of `torch.compile`.
        """
        self.devices, self.backend = devices, backend
        self.notices: list[str] = []
        """For people; whoever reads them takes them out."""
        self._given_up: set[Any] = set()
        self._compiled: dict[Any, Callable[..., tuple[Tensor, Tensor]]] = {}
        self._trusted: set[Any] = set()

    def __call__(self, chunk: Chunk, terms: Terms, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Compute sums and slope. Raises what autograd raises where it is the last method."""
        for key, method in self._methods(chunk, terms):
            try:
                found = method(chunk, terms, factors)
                if method == self.by_kernel_after_trial:
                    self._trusted.add(key)
                return found
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self._given_up.add(key)
                line = str(error).strip().splitlines()[:1]
                self.notices.append(
                    f"the loss on logits is not computed {method.__name__.replace('_', ' ')}, but more slowly "
                    f"({type(error).__name__}: {' '.join(line)})"
                )
        return by_autograd(chunk, terms, factors)

    def _methods(self, chunk: Chunk, terms: Terms) -> Iterator[tuple[Any, SlopeMethod]]:
        if chunk.linear.device.type not in self.devices or len(chunk.linear) == 0:
            return
        key: Any = ("kernel", tuple(term.name for term in terms.named), chunk.cap is None, chunk.product)
        if key not in self._given_up and fits_kernel(chunk, terms):
            known = key in self._trusted or isinstance(chunk.linear, FakeTensor)
            yield key, by_kernel if known else self.by_kernel_after_trial
        if isinstance(chunk.linear, FakeTensor):
            return
        key = ("compiled", terms.key, chunk.cap, chunk.product, type(chunk.teacher))
        if key not in self._given_up and terms.key is not None:
            yield key, self.by_compiled_code
        elif key not in self._given_up:
            self._given_up.add(key)
            self.notices.append("the loss on logits follows a schedule and is not compiled, but computed more slowly")

    def by_kernel_after_trial(self, chunk: Chunk, terms: Terms, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Compare the kernel with autograd on made-up logits before it is used. Raises RuntimeError where it is off."""
        distance = trial(chunk, terms, by_kernel)
        if not distance < AGREEMENT + torch.finfo(chunk.product).eps:
            raise RuntimeError(f"on this device it is {distance:.1e} off")
        return by_kernel(chunk, terms, factors)

    def by_compiled_code(self, chunk: Chunk, terms: Terms, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Run the loss and its gradient as one compiled function; traced at the first chunk, so it must be pure."""
        given = chunk.teacher
        key = terms.key, chunk.cap, chunk.product, type(given)
        parts = (given.ids, given.log_probabilities) if isinstance(given, TopK) else () if given is None else (given,)
        inputs = chunk.linear, chunk.labels, factors, *parts
        if key not in self._compiled:

            def whole(linear: Tensor, labels: Tensor, factors: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
                leaf = linear.detach().requires_grad_()
                teacher = TopK(*parts) if isinstance(given, TopK) else next(iter(parts), None)
                sums = terms.sums(soft_cap(leaf, chunk.cap), teacher, labels)
                (slope,) = torch.autograd.grad((factors * sums).sum(), leaf)
                return sums.detach(), slope.to(chunk.product)

            with torch.enable_grad():
                traced = make_fx(whole, tracing_mode="symbolic")(*inputs)
            self._compiled[key] = torch.compile(traced, fullgraph=True, backend=self.backend)
        for tensor in (chunk.linear, chunk.labels, *parts):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # chunks are of different lengths
        return self._compiled[key](*inputs)


def trial(chunk: Chunk, terms: Terms, method: SlopeMethod, rows: int = 4) -> float:
    """Measure how far a method is off autograd, relative, on random logits of the chunk's form."""
    linear = chunk.linear
    draw = torch.Generator(linear.device).manual_seed(0)

    def logits(like: Tensor) -> Tensor:
        return torch.randn(rows, like.shape[-1], generator=draw, device=like.device, dtype=linear.dtype)

    made = logits(linear)
    teacher = None if chunk.teacher is None else logits(chunk.teacher)
    labels = torch.arange(rows, device=linear.device) % linear.shape[-1]
    factors = torch.ones(len(terms.named), dtype=linear.dtype, device=linear.device)
    sample = replace(chunk, teacher=teacher, labels=labels)
    found, expected = (each(replace(sample, linear=made.clone()), terms, factors) for each in (method, by_autograd))
    return max(
        float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))
        for one, other in zip(found, expected, strict=True)
    )

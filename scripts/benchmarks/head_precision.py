"""Error of the gradient that an output head's operands cause: every divergence, precision and distance to the teacher.

    python scripts/benchmarks/head_precision.py
    python scripts/benchmarks/head_precision.py --device cuda --positions 4096 --vocabulary 128256 --width 2048

The gradient by the head's weight, relative to float64, of random heads and hidden states. On a CPU the operands of the
products are rounded to the number of digits that each precision has, which is what a GPU computes with; sums are fp32.
On a GPU the product's own code runs, and the last column is its time: logits of both sides, loss, and both gradients.
`constant` is error x sqrt(KL), which `distill.losses.precision` calculates with; the error is that of the gradient by
the weight. `bf16 logits` rounds the logits as well, as a model under autocast hands them out.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch
from torch import Tensor

from distill.losses import LOGITS, Objective
from distill.models.forward import Outputs
from distill.models.head import OutputHead
from distill.recipe.schema import Term

DISTANCES = {"far": 1.0, "near": 0.1, "nearer": 0.02}
PRECISIONS = ("bf16 logits", "bf16", "tf32", "fp32")
DIGITS = {"bf16": 7, "bf16 logits": 7, "tf32": 10, "fp32": 23}
"""Bits behind the point of a number's mantissa."""


def main() -> None:
    """Print one row per divergence and distance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for name, size in (("positions", 256), ("width", 256), ("vocabulary", 8000)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--losses", nargs="+", choices=LOGITS, default=list(LOGITS))
    options = parser.parse_args()
    shown = PRECISIONS if options.device == "cpu" else PRECISIONS[1:]
    print(f"{'divergence':<20}{'KL':>9}" + "".join(f"{name:>13}" for name in shown), flush=True)
    constants: dict[str, list[float]] = {name: [] for name in shown}
    for loss in options.losses:
        for near in DISTANCES.values():
            sides = make(near, options)
            exact, kl = reference(loss, sides)
            errors = {name: error(gradient(loss, sides, name), exact) for name in shown}
            if near < 1 and loss not in ("total_variation", "soft_cross_entropy"):
                for name in shown:
                    constants[name].append(errors[name] * math.sqrt(kl))
            print(f"{loss:<20}{kl:>9.2g}" + "".join(f"{errors[name]:>13.1e}" for name in shown), flush=True)
    print(f"{'constant, median':<29}" + "".join(f"{statistics.median(each):>13.1e}" for each in constants.values()))
    if options.device == "cuda":
        sides = make(DISTANCES["near"], options)
        times = [f"{milliseconds(options.losses[0], sides, name):>13.2f}" for name in shown]
        print(f"{'ms, ' + options.losses[0]:<29}" + "".join(times))


Sides = tuple[Tensor, Tensor, Tensor]
"""Weights of student and teacher [V, D], and what both read [N, D]."""


def make(near: float, options: argparse.Namespace) -> Sides:
    """Draw a student whose head is a share `near` away from its teacher's."""
    draw = torch.Generator(options.device).manual_seed(0)
    size = (options.vocabulary, options.width)
    target, noise = (torch.randn(*size, generator=draw, device=options.device) for _ in range(2))
    rows = torch.randn(options.positions, options.width, generator=draw, device=options.device)
    unit = 2 / math.sqrt(options.width)
    return unit * (target + near * noise), unit * target, rows


def reference(loss: str, sides: Sides) -> tuple[Tensor, float]:
    """Compute the gradient in float64, and the KL."""
    weight, target, rows = (tensor.double() for tensor in sides)
    leaf = (rows @ weight.T).requires_grad_()
    teacher = rows @ target.T
    (slope,) = torch.autograd.grad(LOGITS[loss](leaf, teacher).mean(), leaf)
    return slope.T @ rows, LOGITS["forward_kl"](leaf.detach(), teacher).mean().item()


def gradient(loss: str, sides: Sides, precision: str) -> Tensor:
    """Compute it as the product does on a GPU; on a CPU with operands rounded by hand."""
    if sides[0].is_cuda:
        return through_objective(loss, sides, precision)
    weight, target, rows = (rounded(tensor, DIGITS[precision]) for tensor in sides)
    own, teacher = rows @ weight.T, rows @ target.T
    if precision == "bf16 logits":
        own, teacher = own.bfloat16().float(), teacher.bfloat16().float()
    leaf = own.requires_grad_()
    (slope,) = torch.autograd.grad(LOGITS[loss](leaf, teacher).mean(), leaf)
    return rounded(slope, DIGITS[precision]).T @ rows


def rounded(tensor: Tensor, bits: int) -> Tensor:
    """Round fp32 to so many bits of mantissa, half to even."""
    mantissa, exponent = torch.frexp(tensor)
    return torch.ldexp((mantissa * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponent)


def through_objective(loss: str, sides: Sides, precision: str) -> Tensor:
    """Let the objective compute the gradient by the student's weight."""
    weight, target, rows = sides
    leaf = weight.clone().requires_grad_()
    last = rows[None].clone().requires_grad_()
    objective = Objective([Term(match="logits", loss=loss)], "masked_token", head_precision=precision)
    batch = {"labels": torch.zeros(1, len(rows), dtype=torch.int64, device=rows.device)}
    student, teacher = (Outputs(None, {}, last, OutputHead(head)) for head in (leaf, target))
    objective(student, teacher, objective.locate(batch), objective.counts([batch]))[0].backward()
    assert leaf.grad is not None
    return leaf.grad


def milliseconds(loss: str, sides: Sides, precision: str) -> float:
    """Time the objective on a GPU, the median of ten."""
    times = []
    for _ in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        through_objective(loss, sides, precision)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def error(found: Tensor, exact: Tensor) -> float:
    """Relative distance."""
    return ((found.double() - exact).norm() / exact.norm()).item()


if __name__ == "__main__":
    main()

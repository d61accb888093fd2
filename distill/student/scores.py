"""Scores of MLP neurons: one function each, `(layer, statistics, **own) -> [F]`, higher is kept.

F is the width of the layer's MLP. Neuron i is row i of each weight in `layer.weights_in` ([F, D]) and column i of
`layer.weight_out` ([D, F]). Experts have one dimension E in front of everything, scores included: [E, F].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.errors import InputError
from distill.models.layout import StackName
from distill.student.calibration.column_sums import column_products, column_sums
from distill.student.calibration.statistics import Statistics, require

POWERS = {1: torch.abs, 2: torch.square}


@dataclass(frozen=True)
class MlpLayer:
    """One layer's MLP, the input of a score; statistics are those of its stack."""

    index: int
    """Index of the layer in the teacher."""
    weights_in: list[Tensor]
    """[F, D] each: gate and up, or the single first projection."""
    weight_out: Tensor
    """[D, F]."""
    side: StackName = "main"
    """The stack that the layer is in."""


def activation(layer: MlpLayer, statistics: Statistics | None) -> Tensor:
    """Mean absolute activation over real tokens: mean |x_i| of the input of the last projection."""
    return require(statistics, "activation").mean_abs(layer.index)


def activation_l2(layer: MlpLayer, statistics: Statistics | None) -> Tensor:
    """Minitron's aggregation: sqrt(Σ over sequences of (mean over the sequence of |x_i|)²).

    Source: Muralidharan et al. 2024, Minitron (arXiv 2407.14679), batch = L2, seq = mean. Sequences count alike,
    however long they are.
    """
    return require(statistics, "activation_l2").sequence_norm(layer.index)


def output_norm(layer: MlpLayer, statistics: Statistics | None) -> Tensor:
    """Root mean square activation times the norm of the outgoing weights: sqrt(E x_i²) · ‖W_out[:, i]‖₂.

    The size of what the neuron adds to the residual stream. Source: Wanda (Sun et al. 2023, arXiv 2306.11695) summed
    over a neuron's outgoing weights in the 2-norm.
    """
    return torch.sqrt(require(statistics, "output_norm").mean_square(layer.index) * _outgoing(layer, 2))


def wanda(layer: MlpLayer, statistics: Statistics | None) -> Tensor:
    """Mean over the rows d of W_out of |W_di| · sqrt(E x_i²).

    Source: Wanda (Sun et al. 2023, arXiv 2306.11695) per weight; the mean over rows is that of wanda-sp in the code of
    FLAP (An et al. 2023, arXiv 2312.11983).
    """
    size = layer.weight_out.shape[-2]
    return require(statistics, "wanda").mean_square(layer.index).sqrt() * _outgoing(layer, 1) / size


def magnitude(layer: MlpLayer, _statistics: Statistics | None, *, norm: int = 2) -> Tensor:
    """1- or 2-norm of all weights of the neuron: its rows in gate and up and its column in down; needs no data.

    Raises:
        InputError: Another norm.
    """
    if norm not in POWERS:
        raise InputError(f"student.mlp.params.norm: the norm is 1 or 2, not {norm}")
    total = _outgoing(layer, norm)
    for weight in layer.weights_in:
        total = total + column_sums(POWERS[norm], weight.mT).cpu()
    return total ** (1 / norm)


def taylor(layer: MlpLayer, statistics: Statistics | None) -> Tensor:
    """First-order Taylor of the labels' loss: mean over labelled examples of |Σ_t (dL/dx_ti) x_ti|.

    Source: Molchanov et al. 2019 (arXiv 1906.10771), with a gate on the neuron.
    """
    return require(statistics, "taylor").gate_gradient("task_abs", layer.index)


def taylor_kl(layer: MlpLayer, statistics: Statistics | None) -> Tensor:
    """Leading Taylor term of KL(teacher ‖ pruned): ½ · E[(Σ_t (dL/dx_ti) x_ti)²] with labels drawn from the teacher.

    Needs no labels. The first-order term of this KL is zero at the teacher; see
    `distill.student.calibration.gradients`.
    """
    return require(statistics, "taylor_kl").gate_gradient("kl_square", layer.index) / 2


def fisher(layer: MlpLayer, statistics: Statistics | None) -> Tensor:
    """Diagonal of the empirical Fisher information of the gates: mean over labelled examples of (Σ_t (dL/dx_ti) x_ti)².

    Source: Theis et al. 2018 (arXiv 1801.05787).
    """
    return require(statistics, "fisher").gate_gradient("task_square", layer.index)


def fluctuation(layer: MlpLayer, statistics: Statistics | None) -> Tensor:
    """Variance of the activation times the squared norm of the outgoing weights: Var(x_i) · ‖W_out[:, i]‖₂².

    The error of replacing the neuron by its mean. Source: WIFV of FLAP (An et al. 2023, arXiv 2312.11983).
    """
    return require(statistics, "fluctuation").variance(layer.index) * _outgoing(layer, 2)


def output_change(layer: MlpLayer, statistics: Statistics | None) -> Tensor:
    """Rank of removal when neurons are removed one by one, each time the one that changes the MLP's output least.

    Removing the set P changes the output by Σ_P x_i w_i (w_i column i of W_out), in the mean square by the sum over P×P
    of M_ij = E[x_i x_j] · (w_i · w_j). With s_j = Σ_{i in P} M_ij, removing j as well adds 2 s_j + M_jj, and s changes
    by row j of M: O(F) per removal, O(F²) in all. Of equal ones the later is removed. Source: the iterative channel
    contribution of Puzzletron (NVIDIA Model-Optimizer), with exact second moments in place of its running sum.
    """
    gram = require(statistics, "output_change").gram(layer.index)
    if gram.ndim == 3:
        pairs = zip(gram, layer.weight_out, strict=True)
        return torch.stack([_removal_ranks(own * column_products(weight).cpu()) for own, weight in pairs])
    return _removal_ranks(gram.mul_(column_products(layer.weight_out).cpu()))


def _removal_ranks(products: Tensor) -> Tensor:
    """Remove neurons one by one, given M [F, F]; the rank of each, [F], 0 for the first removed."""
    size = len(products)
    cost = products.diagonal().flip(0)  # argmin takes the first of equal ones: let that be the later neuron
    ranks = torch.empty(size, dtype=torch.float64)
    for rank in range(size):
        place = int(cost.argmin())
        chosen = size - 1 - place
        ranks[chosen] = rank
        cost.add_(products[chosen].flip(0), alpha=2)
        cost[place] = torch.inf
    return ranks


def random(layer: MlpLayer, _statistics: Statistics | None, *, seed: int = 0) -> Tensor:
    """Uniform random scores: the control for every other score."""
    stack = 500_000 if layer.side == "encoder" else 0
    generator = torch.Generator().manual_seed(seed * 1_000_003 + stack + layer.index)
    shape = (*layer.weight_out.shape[:-2], layer.weight_out.shape[-1])
    return torch.rand(shape, generator=generator)


def _outgoing(layer: MlpLayer, power: int) -> Tensor:
    """Sum |W_di|^power over the rows d, [F]."""
    return column_sums(POWERS[power], layer.weight_out).cpu()


SCORES: dict[str, Callable[..., Tensor]] = {
    "activation": activation,
    "activation_l2": activation_l2,
    "output_norm": output_norm,
    "wanda": wanda,
    "magnitude": magnitude,
    "taylor": taylor,
    "taylor_kl": taylor_kl,
    "fisher": fisher,
    "fluctuation": fluctuation,
    "output_change": output_change,
    "random": random,
}

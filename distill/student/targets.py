"""A size for the student: solve for the share of neurons that has so many parameters or FLOPs, or takes so long."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from distill.errors import InputError
from distill.models.cost import flops_by_module, random_example
from distill.models.family import layout_of
from distill.models.layout import StackName
from distill.models.plan import Outcome
from distill.models.widths import axes_of
from distill.recipe.schema import Mlp, Student, Target
from distill.student.allocate import SHARES_BUDGET, floor_width, round_down

LayerKey = tuple[StackName, int]
"""A layer of the teacher."""


@dataclass(frozen=True)
class LayerCost:
    """The share of one layer in the cost of a model."""

    whole: float
    """With all its neurons."""
    unit: float
    """Each of its MLP's neurons."""
    width: int
    """Number of neurons."""

    def at(self, width: int) -> float:
        """With so many neurons."""
        return self.whole - (self.width - width) * self.unit


@dataclass(frozen=True)
class Costs:
    """Parameters or FLOPs of a model, which are linear in the widths of its MLPs."""

    total: float
    layers: dict[LayerKey, LayerCost]

    @property
    def fixed(self) -> float:
        """The share outside of the layers."""
        return self.total - sum(layer.whole for layer in self.layers.values())

    def of(self, kept: Sequence[LayerKey], widths: Sequence[int]) -> float:
        """The cost of a student."""
        return self.fixed + sum(self.layers[place].at(width) for place, width in zip(kept, widths, strict=True))


def costs_of(model: Any, target: Target) -> Costs:
    """Count the parameters or FLOPs, as the target says, of a model and of its layers; nothing is computed."""
    by_parameters, layers = target.kind == "parameters", {}
    flops = {} if by_parameters else flops_by_module(model, random_example(model, target.length))[0]
    for side, index, axis in axes_of(model):
        if by_parameters:
            shared = layout_of(model).stack(side).first_only  # a student has these once, whichever layers it keeps
            sizes = {name: tensor.numel() for name, tensor in axis.layer.named_parameters() if name not in shared}
            whole, of_units = sum(sizes.values()), sum(sizes[name] for name in axis.tensors)
        else:
            owners = {name.rpartition(".")[0] for name in axis.tensors}
            whole, of_units = flops[axis.layer], sum(flops[axis.layer.get_submodule(owner)] for owner in owners)
        layers[side, index] = LayerCost(whole, of_units / axis.units, axis.units)
    total = sum(parameter.numel() for parameter in model.parameters()) if by_parameters else flops[model]
    return Costs(float(total), layers)


def check_target(model: Any, spec: Student) -> None:
    """Refuse a target that no choice of layers and neurons can reach, before any work.

    Latency is not checked here: it has to be measured.

    Raises:
        InputError: The target is out of reach; names what can be reached.
    """
    target = spec.target
    if target is None or target.kind == "latency":
        return
    costs = costs_of(model, target)
    low = high = costs.fixed
    for side in layout_of(model).sides:
        layers = spec.layers if side == "main" else spec.encoder_layers
        listed = layers.keep if layers is not None and isinstance(layers.keep, list) else None
        number = layers.keep if layers is not None and isinstance(layers.keep, int) else None
        own = [
            (layer, layer.width if side == "main" and index in spec.mlp.protect else floor_width(spec.mlp, layer.width))
            for (stack, index), layer in costs.layers.items()
            if stack == side and (listed is None or index in listed)
        ]
        # Where a policy will choose the layers, these are the cheapest and the dearest.
        low += sum(sorted(layer.at(least) for layer, least in own)[:number])
        high += sum(sorted((layer.whole for layer, _ in own), reverse=True)[:number])
    _refuse_outside(target, _target_value(target, costs.total), low, high, costs.total)


def shares(mlp: Mlp, widths: Sequence[int]) -> list[float]:
    """Ascending values of `mlp.keep` that give different students, given the teacher's widths of the cut layers."""
    floors, multiple = [floor_width(mlp, width) for width in widths], mlp.multiple_of
    if mlp.allocate in SHARES_BUDGET:
        total = sum(widths)
        sizes = {min(size, total) for size in range(multiple, total + multiple, multiple)} | {sum(floors)}
        return sorted(size / total for size in sizes if size >= sum(floors))
    found = {min(size, width) / width for width in widths for size in range(multiple, width + multiple, multiple)}
    pairs = list(zip(widths, floors, strict=True))
    return sorted(
        share for share in found if all(round_down(share * width, width, multiple) >= at for width, at in pairs)
    )


def solve(
    target: Target, total: float, steps: Sequence[float], cost: Callable[[float], float]
) -> tuple[float, Outcome]:
    """Find the largest share of neurons whose cost is within the target, by bisection; also what was asked and got.

    Args:
        target: What is asked.
        total: The teacher's cost; 1 for latency.
        steps: Shares to choose from, ascending.
        cost: Of a student with this share; grows with it.

    Raises:
        InputError: Even the smallest share costs more, or keeping everything costs less.
    """
    asked, known = _target_value(target, total), cache(cost)  # a latency is measured once
    _refuse_outside(target, asked, known(steps[0]), known(steps[-1]), total)
    share = steps[max(1, bisect_right(steps, asked, key=known)) - 1]
    got = known(share)
    reason = "the largest within it that rounding to multiple_of allows" if got < asked else ""
    return share, Outcome(asked=_format_cost(target, asked, total), got=_format_cost(target, got, total), reason=reason)


def _target_value(target: Target, total: float) -> float:
    value = getattr(target, target.kind)
    return float(value) if isinstance(value, int) else value * total


def _refuse_outside(target: Target, asked: float, low: float, high: float, total: float) -> None:
    if asked < low or asked > high * (1 + 1e-9):
        raise InputError(
            f"student.target.{target.kind}: {_format_cost(target, asked, total)} cannot be reached with these layers; "
            f"their MLPs alone give {_format_cost(target, low, total)} to {_format_cost(target, high, total)}"
        )


def _format_cost(target: Target, value: float, total: float) -> str:
    share = f"{value / total:.4f} of the teacher's"
    return share if target.kind == "latency" else f"{value:.0f} {target.kind} ({share})"

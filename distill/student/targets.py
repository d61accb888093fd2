"""A size for the student: which share of its neurons has so many parameters, so many FLOPs, or takes so long."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from distill.errors import InputError
from distill.models.cost import example, flops_by_module
from distill.models.family import layers_of, layout_of
from distill.models.layout import StackName
from distill.models.mlp import Mlp, mlps_of
from distill.models.plan import Choice
from distill.recipe.schema import Layers, Student, Target
from distill.recipe.schema import Mlp as MlpSpec
from distill.student.allocate import SHARES_BUDGET, floor_width, rounded_down

Place = tuple[StackName, int]
"""A layer of the teacher."""


@dataclass(frozen=True)
class LayerCost:
    """What one layer adds to the whole."""

    whole: float
    """With all its neurons."""
    neuron: float
    """Each of its MLP's neurons."""
    width: int
    """How many there are."""

    def at(self, width: int) -> float:
        """With so many neurons."""
        return self.whole - (self.width - width) * self.neuron


@dataclass(frozen=True)
class Costs:
    """Parameters or FLOPs of a model, which are linear in the widths of its MLPs."""

    total: float
    layers: dict[Place, LayerCost]

    @property
    def fixed(self) -> float:
        """What is not inside the layers."""
        return self.total - sum(layer.whole for layer in self.layers.values())

    def of(self, kept: Sequence[Place], widths: Sequence[int]) -> float:
        """The cost of a student."""
        return self.fixed + sum(self.layers[place].at(width) for place, width in zip(kept, widths, strict=True))


def costs_of(model: Any, target: Target) -> Costs:
    """Parameters or FLOPs, as the target says, of a model and of its parts. FLOPs are counted, nothing is computed."""
    if target.kind == "parameters":
        counts = {parameter: parameter.numel() for parameter in model.parameters()}
        layers = {place: _parameters(model, place, layer, mlp) for place, layer, mlp in _layers(model)}
        return Costs(float(sum(counts.values())), layers)
    flops, _ = flops_by_module(model, example(model, target.length))
    return Costs(float(flops[model]), {place: _flops(flops, layer, mlp) for place, layer, mlp in _layers(model)})


def _layers(model: Any) -> Iterator[tuple[Place, nn.Module, Mlp]]:
    for side in layout_of(model).sides:
        for index, (layer, mlp) in enumerate(zip(layers_of(model, side), mlps_of(model, side), strict=True)):
            yield (side, index), layer, mlp


def _parameters(model: Any, place: Place, layer: nn.Module, mlp: Mlp) -> LayerCost:
    shared = layout_of(model).stack(place[0]).first_only  # a student has these once, whichever layers it keeps
    sizes = {name: parameter.numel() for name, parameter in layer.named_parameters() if name not in shared}
    of_neurons = sum(sizes.get(name, 0) for name in mlp.layout.axes())
    return LayerCost(sum(sizes.values()), of_neurons / mlp.width, mlp.width)


def _flops(flops: dict[nn.Module, int], layer: nn.Module, mlp: Mlp) -> LayerCost:
    paths = {mlp.layout.out, *mlp.layout.ins}
    if mlp.layout.form == "experts":  # parameters of one module, all of whose work is in proportion to the width
        paths = {path.rpartition(".")[0] for path in paths}
    of_neurons = sum(flops[layer.get_submodule(path)] for path in paths)
    return LayerCost(flops[layer], of_neurons / mlp.width, mlp.width)


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
        own = {index: layer for (stack, index), layer in costs.layers.items() if stack == side}
        whole = spec.mlp.protect if side == "main" else []
        floors = {
            index: layer.width if index in whole else floor_width(spec.mlp, layer.width) for index, layer in own.items()
        }
        layers = spec.layers if side == "main" else spec.encoder_layers
        low += sum(_kept({index: layer.at(floors[index]) for index, layer in own.items()}, layers))
        high += sum(_kept({index: layer.whole for index, layer in own.items()}, layers, dearest=True))
    _refuse_outside(target, _asked(target, costs.total), low, high, costs.total)


def _kept(costs: dict[int, float], layers: Layers | None, dearest: bool = False) -> list[float]:
    """Costs of the layers that are kept; where a policy will choose them, of the cheapest or dearest."""
    if layers is None:
        return list(costs.values())
    if isinstance(layers.keep, list):
        return [costs[index] for index in layers.keep if index in costs]
    return sorted(costs.values(), reverse=dearest)[: layers.keep]


def shares(mlp: MlpSpec, widths: Sequence[int]) -> list[float]:
    """Ascending values of `mlp.keep` that give different students, given the teacher's widths of the cut layers."""
    floors, multiple = [floor_width(mlp, width) for width in widths], mlp.multiple_of
    if mlp.allocate in SHARES_BUDGET:
        total = sum(widths)
        sizes = {min(size, total) for size in range(multiple, total + multiple, multiple)} | {sum(floors)}
        return sorted(size / total for size in sizes if size >= sum(floors))
    found = {min(size, width) / width for width in widths for size in range(multiple, width + multiple, multiple)}
    pairs = list(zip(widths, floors, strict=True))
    return sorted(
        share for share in found if all(rounded_down(share * width, width, multiple) >= at for width, at in pairs)
    )


def solve(target: Target, total: float, steps: Sequence[float], cost: Callable[[float], float]) -> tuple[float, Choice]:
    """The largest share of neurons whose cost is within the target, by bisection, and what was asked and got.

    Args:
        target: What is asked.
        total: The teacher's cost; 1 for latency.
        steps: Shares to choose from, ascending.
        cost: Of a student with this share; grows with it.

    Raises:
        InputError: Even the smallest share costs more, or keeping everything costs less.
    """
    asked = _asked(target, total)
    known = {step: cost(step) for step in (steps[0], steps[-1])}
    _refuse_outside(target, asked, known[steps[0]], known[steps[-1]], total)
    low, high = 0, len(steps) - 1
    if known[steps[high]] <= asked:
        low = high
    while high - low > 1:
        middle = (low + high) // 2
        known[steps[middle]] = cost(steps[middle])
        low, high = (middle, high) if known[steps[middle]] <= asked else (low, middle)
    share, got = steps[low], known[steps[low]]
    reason = "the largest within it that rounding to multiple_of allows" if got < asked else ""
    return share, Choice(asked=_words(target, asked, total), got=_words(target, got, total), reason=reason)


def _asked(target: Target, total: float) -> float:
    value = getattr(target, target.kind)
    return float(value) if isinstance(value, int) else value * total


def _refuse_outside(target: Target, asked: float, low: float, high: float, total: float) -> None:
    if asked < low or asked > high * (1 + 1e-9):
        raise InputError(
            f"student.target.{target.kind}: {_words(target, asked, total)} cannot be reached with these layers; "
            f"their MLPs alone give {_words(target, low, total)} to {_words(target, high, total)}"
        )


def _words(target: Target, value: float, total: float) -> str:
    share = f"{value / total:.4f} of the teacher's"
    return share if target.kind == "latency" else f"{value:.0f} {target.kind} ({share})"

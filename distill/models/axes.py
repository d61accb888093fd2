"""Select, pad, sum and resize along a named axis of a layer, whichever axis it is.

U units, F entries of a tensor along the axis, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.models.layout import Axis, UnitDim


@dataclass(frozen=True)
class LayerAxis:
    """One axis of one layer."""

    layer: nn.Module
    axis: Axis

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters that hold the axis, by name inside the layer."""
        found = dict(self.layer.named_parameters())
        return {name: found[name] for name in self.axis.tensors if name in found}

    @property
    def units(self) -> int:
        """U."""
        name, tensor = next(iter(self.tensors.items()))
        dim, fused, block = self.axis.tensors[name]
        return tensor.shape[dim] // (fused * block)

    @torch.no_grad()
    def resize(self, units: int) -> None:
        """Give the layer another number of units; the weights are left for the caller to fill."""
        before = self.units
        if units == before:
            return
        for name, old in self.tensors.items():
            owner, _, kind = name.rpartition(".")
            shape, dim = list(old.shape), self.axis.tensors[name].dim
            shape[dim] = shape[dim] // before * units
            module = self.layer.get_submodule(owner)
            setattr(module, kind, nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad))
            # Modules remember their sizes; a stale number would show in `repr` and mislead exporters.
            if self.axis.per_expert:
                module.intermediate_dim = units  # type: ignore[assignment]
            elif len(shape) == 2:
                sizes = ("nx", "nf") if hasattr(module, "nx") else ("out_features", "in_features")
                for size, attribute in zip(shape, sizes, strict=True):
                    setattr(module, attribute, size)


def keep_units(tensor: Tensor, place: UnitDim, units: Tensor) -> Tensor:
    """Select units of a tensor.

    Args:
        tensor: Holds each unit along `place.dim`.
        place: Its layout along the axis.
        units: [U'] indices to keep, in order; [E, U'] for experts, each with its own.
    """
    dim = place.dim
    split = _split_units(tensor, place)
    if units.ndim == 1:
        return split.index_select(dim + 1, units).flatten(dim, dim + 2)
    experts = zip(split, units, strict=True)
    return torch.stack([expert.index_select(dim, own) for expert, own in experts]).flatten(dim, dim + 2)


def pad_units(tensor: Tensor, place: UnitDim, units: int) -> Tensor:
    """Add zero units behind those of a tensor, up to so many."""
    dim = place.dim
    split = _split_units(tensor, place)
    shape = list(split.shape)
    shape[dim + 1] = units
    wide = split.new_zeros(shape)
    wide.narrow(dim + 1, 0, split.shape[dim + 1]).copy_(split)
    return wide.flatten(dim, dim + 2)


def sum_per_unit(values: Tensor, place: UnitDim, per_expert: bool) -> Tensor:
    """Add up the entries of each unit, [U] or [E, U], of values laid out like a tensor."""
    split = _split_units(values, place)
    kept = {place.dim + 1, 0} if per_expert else {place.dim + 1}
    return split.sum([dim for dim in range(split.ndim) if dim not in kept])


def spread_units(units: Tensor, place: UnitDim, shape: torch.Size) -> Tensor:
    """Lay out a value per unit, [U] or [E, U], like a tensor of this shape."""
    entries = units.repeat_interleave(place.block, -1).tile(place.fused)
    kept = {place.dim, 0} if units.ndim == 2 else {place.dim}
    return entries.view([size if dim in kept else 1 for dim, size in enumerate(shape)]).expand(shape).contiguous()


def _split_units(tensor: Tensor, place: UnitDim) -> Tensor:
    """View dimension `dim` as three: groups, units, entries of a unit."""
    return torch.unflatten(tensor, place.dim, (place.fused, -1, place.block))

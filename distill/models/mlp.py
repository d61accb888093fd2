"""The MLP of one layer as its neurons, whatever its modules are called and however its weights lie.

F neurons, D hidden width, E experts, N positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from distill.errors import InputError
from distill.models.family import layers_of, layout_of
from distill.models.layout import MlpLayout, StackName

See = Callable[[Tensor, Tensor | None, int], None]
"""Called with neurons [N, F], the flat positions (in B * L) they belong to [N] (None: all of them), and the expert."""


@dataclass(frozen=True)
class Mlp:
    """One layer's MLP. Neuron i is row i of each weight in `weights_in` and column i of `weight_out`."""

    layer: nn.Module
    layout: MlpLayout

    @property
    def width(self) -> int:
        """F."""
        return int(self.weight_out.shape[-1])

    @property
    def experts(self) -> int | None:
        """E, or None for an MLP without experts."""
        return int(self.weight_out.shape[0]) if self.layout.form == "experts" else None

    @property
    def weights_in(self) -> list[Tensor]:
        """[F, D] each, gate before up; [E, F, D] for experts."""
        return [
            part for path in self.layout.ins for part in self._upright(self._weight(path)).chunk(self.layout.parts, -2)
        ]

    @property
    def biases_in(self) -> list[Tensor]:
        """[F] each, in the order of `weights_in`; empty where there are none."""
        biases = [self._bias(path) for path in self.layout.ins]
        return [part for bias in biases if bias is not None for part in bias.chunk(self.layout.parts)]

    @property
    def weight_out(self) -> Tensor:
        """[D, F]; [E, D, F] for experts."""
        return self._upright(self._weight(self.layout.out))

    @property
    def bias_out(self) -> Tensor | None:
        """[D], or None."""
        return self._bias(self.layout.out)

    @property
    def output(self) -> nn.Module:
        """The module whose output is what the neurons give [.., D]: the last projection, or all experts together."""
        path = self.layout.out
        return self.layer.get_submodule(path.rpartition(".")[0] if self.layout.form == "experts" else path)

    def watch(self, see: See) -> RemovableHandle:
        """Call `see` with the neurons' activations in every forward pass, until the handle is removed.

        The neurons of experts never pass through a module of their own; they are computed a second time.
        """
        if self.layout.form != "experts":
            return self.output.register_forward_pre_hook(lambda _module, inputs: see(inputs[0].flatten(0, -2), None, 0))
        return self.output.register_forward_pre_hook(self._expert_hook(see), with_kwargs=True)

    def _expert_hook(self, see: See) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            states, chosen = [*args, *kwargs.values()][
                :2
            ]  # hidden states [B * L, D], experts of each position [B * L, K]
            for expert in range(self.experts or 0):
                positions = (chosen == expert).any(-1).nonzero().squeeze(-1)
                gate, *up = (functional.linear(states[positions], weight[expert]) for weight in self.weights_in)
                neurons = module.act_fn(gate)
                see(neurons * up[0] if up else neurons, positions, expert)

        return hook

    @torch.no_grad()
    def resize(self, width: int) -> None:
        """Give the MLP another number of neurons; the weights are left for the caller to fill."""
        if width == self.width:
            return
        for name, (axis, parts) in self.layout.axes().items():
            owner, _, kind = name.rpartition(".")
            module = self.layer.get_submodule(owner)
            old = getattr(module, kind, None)
            if old is not None:
                shape = list(old.shape)
                shape[axis] = parts * width
                setattr(module, kind, nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad))
        for path in (*self.layout.ins, self.layout.out):
            self._note_width(path, width)

    def _note_width(self, path: str, width: int) -> None:
        """Modules remember their sizes; a stale number would show in `repr` and mislead exporters."""
        if self.layout.form == "experts":
            self.layer.get_submodule(path.rpartition(".")[0]).intermediate_dim = width  # type: ignore[assignment]
            return
        reads = path == self.layout.out
        names = {"linear": ("out_features", "in_features"), "conv1d": ("nf", "nx")}[self.layout.form]
        setattr(self.layer.get_submodule(path), names[reads], width if reads else self.layout.parts * width)

    def _weight(self, path: str) -> Tensor:
        if self.layout.form == "experts":
            return self.layer.get_parameter(path)
        return self.layer.get_parameter(f"{path}.weight")

    def _bias(self, path: str) -> Tensor | None:
        if self.layout.form == "experts":
            return None
        bias = getattr(self.layer.get_submodule(path), "bias", None)
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def _upright(self, weight: Tensor) -> Tensor:
        """[out, in], also for weights that are kept the other way round."""
        return weight.T if self.layout.form == "conv1d" else weight


def mlps_of(model: Any, side: StackName = "main") -> list[Mlp]:
    """The MLP of every layer of one stack."""
    candidates = layout_of(model).stack(side).mlps
    return [mlp_of(layer, candidates) for layer in layers_of(model, side)]


def mlp_of(layer: nn.Module, candidates: tuple[MlpLayout, ...]) -> Mlp:
    """The MLP of a layer. Raises InputError when it is none of the known ones."""
    for layout in candidates:
        if all(_exists(layer, path, layout) for path in (*layout.ins, layout.out)):
            return Mlp(layer, layout)
    wanted = " or ".join(" + ".join((*layout.ins, layout.out)) for layout in candidates)
    raise InputError(f"a {type(layer).__name__} of the model has no MLP made of {wanted}")


def _exists(layer: nn.Module, path: str, layout: MlpLayout) -> bool:
    try:
        if layout.form == "experts":
            layer.get_parameter(path)
        else:
            layer.get_parameter(f"{path}.weight")
    except AttributeError:
        return False
    return True


def keep_neurons(tensor: Tensor, axis: int, parts: int, neurons: Tensor | None) -> Tensor:
    """The tensor with only some of its neurons.

    Args:
        tensor: A weight or bias with `parts` * F entries along `axis`.
        axis: Where the neurons lie.
        parts: How often each occurs.
        neurons: [F'] indices to keep, in order; [E, F'] for experts, each with its own; None keeps all.
    """
    if neurons is None:
        return tensor
    width = tensor.shape[axis] // parts
    index = torch.cat([neurons + part * width for part in range(parts)], dim=-1)
    if index.ndim == 1:
        return tensor.index_select(axis, index)
    return torch.stack([own.index_select(axis - 1, kept) for own, kept in zip(tensor, index, strict=True)])

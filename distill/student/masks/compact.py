"""Remove the MLP neurons that have no effect, so that masked neurons are really gone.

With h_i = act(gate_i) * up_i (act(in_i) without a gate) and out = W_out h + b_out, a neuron has no effect on what
depends on the input when its column of W_out is zero, or when h_i is constant because its rows are. A constant h_i that
is not zero moves into b_out; where there is no b_out the neuron stays. F neurons, E experts, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill.models.axes import keep_units
from distill.models.mlp import NeuronAxis, placed_mlps
from distill.models.widths import resize_layers

ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "intermediate_act_fn")
"""Names of the MLP's activation in the families."""


@torch.no_grad()
def compact(model: Any, *, uniform: bool = False, multiple_of: int = 1) -> int:
    """Remove dead neurons from the model in place; its outputs stay the same up to rounding.

    All experts of a layer lose as many as the one with the fewest dead can.

    Args:
        model: A transformers model of a known family.
        uniform: Every layer loses as many as the one with the fewest dead can, so that one width holds for all.
            Otherwise widths may differ and `config.per_layer_config` lists them.
        multiple_of: New widths are rounded up to a multiple of this.

    Returns:
        Number of removed neurons, those of all experts counted.
    """
    placed = placed_mlps(model)
    mlps = [mlp for _, _, mlp in placed]
    constants = [constant_of(mlp) for mlp in mlps]
    widths = [_live_width(mlp, constant, multiple_of) for mlp, constant in zip(mlps, constants, strict=True)]
    if uniform:
        by_key = [(mlp.axis.config_key, width) for mlp, width in zip(mlps, widths, strict=True)]
        widths = [max(width for other, width in by_key if other == key) for key, _ in by_key]
    gone = sum((mlp.width - width) * (mlp.experts or 1) for mlp, width in zip(mlps, widths, strict=True))
    kept = [_cut(*each) for each in zip(mlps, constants, widths, strict=True)]
    width_of = {(side, index): width for (side, index, _), width in zip(placed, widths, strict=True)}
    resize_layers(model, lambda side, index, _axis: width_of[side, index])
    for mlp, tensors in zip(mlps, kept, strict=True):
        for name, tensor in tensors.items():
            mlp.layer.get_parameter(name).copy_(tensor)
    return gone


def constant_of(mlp: NeuronAxis) -> Tensor:
    """Compute the constant that each neuron adds to h_i, [F] or [E, F] in float64; NaN for a neuron that has an effect.

    0 also stands for a neuron whose column of W_out is zero.
    """
    ins = [weight.double() for weight in mlp.weights_in]
    silent = [(weight == 0).all(-1) for weight in ins]
    biases = [bias.double() for bias in mlp.biases_in] or [weight.new_zeros(weight.shape[:-1]) for weight in ins]
    unknown = torch.full_like(biases[0], torch.nan)
    act = _activation(mlp)
    first = torch.where(silent[0], act(biases[0]), unknown) if act else unknown
    value = first
    for up, bias in zip(silent[1:], biases[1:], strict=True):
        second = torch.where(up, bias, unknown)
        # A factor that is always zero silences the other one, whatever that is.
        value = torch.where((first == 0) | (second == 0), 0.0, first * second)
    value = torch.where((mlp.weight_out == 0).all(-2), 0.0, value)
    return value if mlp.bias_out is not None else torch.where(value == 0, value, unknown)


def _activation(mlp: NeuronAxis) -> Callable[[Tensor], Tensor] | None:
    """Find the activation of an MLP in the module nearest to its first weight that has one."""
    parents = mlp.layout.ins[0].split(".")[:-1]
    for depth in range(len(parents), -1, -1):
        module = mlp.layer.get_submodule(".".join(parents[:depth]))
        found = next((getattr(module, name) for name in ACTIVATIONS if callable(getattr(module, name, None))), None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


def _live_width(mlp: NeuronAxis, constant: Tensor, multiple_of: int) -> int:
    """Find the smallest width that holds every live neuron of each expert."""
    live = max(1, int(constant.isnan().sum(-1).max()))
    return min(mlp.width, -(-live // multiple_of) * multiple_of)


def _cut(mlp: NeuronAxis, constant: Tensor, width: int) -> dict[str, Tensor]:
    """Cut the MLP's tensors to `width` neurons: the live ones, and the first dead ones where there is room for more."""
    dead = ~constant.isnan()
    neurons = dead.int().argsort(dim=-1, stable=True)[..., :width].sort(dim=-1).values
    cut = {name: keep_units(old.detach(), mlp.axis.tensors[name], neurons) for name, old in mlp.tensors.items()}
    if mlp.bias_out is not None:
        lost = dead.scatter(-1, neurons, False)
        added = mlp.weight_out.double() @ constant.where(lost, 0.0)
        cut[f"{mlp.layout.out}.bias"] = (mlp.bias_out.double() + added).to(mlp.bias_out.dtype)
    return cut

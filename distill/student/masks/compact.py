"""Take out the MLP neurons that have no effect, so that what a mask has emptied is really gone.

With h_i = act(gate_i) * up_i (act(in_i) without a gate) and out = W_out h + b_out, a neuron has no effect on what
depends on the input when its column of W_out is zero, or when h_i is constant because its rows are. A constant h_i that
is not zero moves into b_out; where there is no b_out the neuron stays. F neurons, E experts, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill.models.family import layout_of
from distill.models.mlp import Mlp, keep_neurons, mlps_of
from distill.models.widths import forget_widths, narrow, widest

ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "intermediate_act_fn")
"""What the families call the activation of their MLPs."""


@torch.no_grad()
def compact(model: Any, *, uniform: bool = False, multiple_of: int = 1) -> int:
    """Take dead neurons out of the model in place; its outputs stay the same up to rounding.

    All experts of a layer lose as many as the one with the fewest dead can.

    Args:
        model: A transformers model of a known family.
        uniform: Every layer loses as many as the one with the fewest dead can, so that one width holds for all.
            Otherwise widths may differ and `config.per_layer_config` lists them.
        multiple_of: New widths are rounded up to a multiple of this.

    Returns:
        How many neurons are gone, those of all experts counted.
    """
    sides = layout_of(model).sides
    stacks = {side: mlps_of(model, side) for side in sides}
    mlps = [mlp for side in sides for mlp in stacks[side]]
    constants = [constant_of(mlp) for mlp in mlps]
    widths = [_width(mlp, constant, multiple_of) for mlp, constant in zip(mlps, constants, strict=True)]
    if uniform:
        common = widest(mlps, widths)
        widths = [common[mlp.layout.width_key] for mlp in mlps]
    gone = sum((mlp.width - width) * (mlp.experts or 1) for mlp, width in zip(mlps, widths, strict=True))
    kept = [_without(*each) for each in zip(mlps, constants, widths, strict=True)]
    _resize(model, mlps, widths)
    left = iter(widths)
    narrow(model, {side: [next(left) for _ in stacks[side]] for side in sides})
    for mlp, tensors in zip(mlps, kept, strict=True):
        for name, tensor in tensors.items():
            mlp.layer.get_parameter(name).copy_(tensor)
    return gone


def constant_of(mlp: Mlp) -> Tensor:
    """[F] or [E, F], float64: what the neuron adds to every input's h_i; NaN for a neuron that has an effect.

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


def _activation(mlp: Mlp) -> Callable[[Tensor], Tensor] | None:
    """The activation of an MLP, from the module nearest to its first weight that has one."""
    parents = mlp.layout.ins[0].split(".")[:-1]
    for depth in range(len(parents), -1, -1):
        module = mlp.layer.get_submodule(".".join(parents[:depth]))
        found = next((getattr(module, name) for name in ACTIVATIONS if callable(getattr(module, name, None))), None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


def _width(mlp: Mlp, constant: Tensor, multiple_of: int) -> int:
    """The smallest width that holds every live neuron of each expert."""
    live = max(1, int(constant.isnan().sum(-1).max()))
    return min(mlp.width, -(-live // multiple_of) * multiple_of)


def _without(mlp: Mlp, constant: Tensor, width: int) -> dict[str, Tensor]:
    """The MLP's tensors with `width` neurons: the live ones, and the first dead ones where there is room for more."""
    dead = ~constant.isnan()
    neurons = dead.int().argsort(dim=-1, stable=True)[..., :width].sort(dim=-1).values
    tensors = dict(mlp.layer.named_parameters())
    places = {name: place for name, place in mlp.layout.axes().items() if name in tensors}
    cut = {name: keep_neurons(tensors[name].detach(), *place, neurons) for name, place in places.items()}
    if mlp.bias_out is not None:
        lost = dead.scatter(-1, neurons, False)
        added = mlp.weight_out.double() @ constant.where(lost, 0.0)
        cut[f"{mlp.layout.out}.bias"] = (mlp.bias_out.double() + added).to(mlp.bias_out.dtype)
    return cut


def _resize(model: Any, mlps: list[Mlp], widths: list[int]) -> None:
    """Give all MLPs, and the config, the widest of the new widths; `narrow` does the rest."""
    forget_widths(model.config)
    before = widest(mlps, [mlp.width for mlp in mlps])
    after = widest(mlps, widths)
    for key, width in after.items():
        if width != before[key]:
            setattr(model.config, key, width)
    for mlp in mlps:
        mlp.resize(after[mlp.layout.width_key])

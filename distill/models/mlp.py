"""The MLP of one layer as its neurons, whatever its modules are called and however its weights are stored.

F neurons, D hidden width, E experts, N positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from distill.errors import InputError
from distill.models.axes import LayerAxis
from distill.models.family import layers_of, layout_of
from distill.models.layout import MlpLayout, StackName

OnNeurons = Callable[[Tensor, Tensor | None, int], None]
"""Called with neurons [N, F], the flat positions (in B * L) they belong to [N] (None: all of them), and the expert."""


@dataclass(frozen=True)
class NeuronAxis(LayerAxis):
    """One layer's MLP. Neuron i is row i of each weight in `weights_in` and column i of `weight_out`."""

    layout: MlpLayout

    @property
    def width(self) -> int:
        """F."""
        return self.units

    @property
    def experts(self) -> int | None:
        """E, or None for an MLP without experts."""
        return len(self.weight_out) if self.layout.per_expert else None

    @property
    def weights_in(self) -> list[Tensor]:
        """[F, D] each, gate before up; [E, F, D] for experts."""
        weights = [self._oriented(self.layer.get_parameter(name)) for name in self.layout.weights[:-1]]
        return [half for weight in weights for half in weight.chunk(self.layout.fused, -2)]

    @property
    def biases_in(self) -> list[Tensor]:
        """[F] each, in the order of `weights_in`; empty where there are none."""
        biases = [bias for path in self.layout.ins if (bias := self._bias(path)) is not None]
        return [half for bias in biases for half in bias.chunk(self.layout.fused)]

    @property
    def parameter_out(self) -> nn.Parameter:
        """The parameter that reads the neurons, as it is stored."""
        return self.layer.get_parameter(self.layout.weights[-1])

    @property
    def weight_out(self) -> Tensor:
        """[D, F]; [E, D, F] for experts."""
        return self._oriented(self.parameter_out)

    @property
    def bias_out(self) -> Tensor | None:
        """[D], or None."""
        return self._bias(self.layout.out)

    @property
    def output(self) -> nn.Module:
        """The module that turns neurons into the MLP's output [.., D]: the last projection, or all experts together."""
        return self.layer.get_submodule(self.layout.weights[-1].rpartition(".")[0])

    def watch(self, on_neurons: OnNeurons) -> RemovableHandle:
        """Call `on_neurons` with the neurons' activations in every forward pass, until the handle is removed.

        The neurons of experts never pass through a module of their own; they are computed a second time.
        """

        def on_experts(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            # Hidden states [B * L, D], and the K experts of each position [B * L, K].
            states, routed = [*args, *kwargs.values()][:2]
            for expert in range(self.experts or 0):
                positions = (routed == expert).any(-1).nonzero().squeeze(-1)
                gate, *up = (functional.linear(states[positions], weight[expert]) for weight in self.weights_in)
                neurons = module.act_fn(gate)
                on_neurons(neurons * up[0] if up else neurons, positions, expert)

        if self.layout.per_expert:
            return self.output.register_forward_pre_hook(on_experts, with_kwargs=True)
        return self.output.register_forward_pre_hook(lambda _module, args: on_neurons(args[0].flatten(0, -2), None, 0))

    def _bias(self, path: str) -> Tensor | None:
        bias = None if self.layout.per_expert else getattr(self.layer.get_submodule(path), "bias", None)
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def _oriented(self, weight: Tensor) -> Tensor:
        """[out, in], also for weights that are stored transposed."""
        return weight.T if self.layout.storage == "conv1d" else weight


def mlps_of(model: Any, side: StackName = "main") -> list[NeuronAxis]:
    """The MLP of every layer of one stack. Raises InputError when a layer has none of its family's kinds."""
    candidates = layout_of(model).stack(side).mlps
    return [_mlp_of(layer, candidates) for layer in layers_of(model, side)]


def placed_mlps(model: Any) -> list[tuple[StackName, int, NeuronAxis]]:
    """The MLP of every layer with its stack and index, in the order of the forward pass."""
    return [(side, index, mlp) for side in layout_of(model).sides for index, mlp in enumerate(mlps_of(model, side))]


def _mlp_of(layer: nn.Module, candidates: tuple[MlpLayout, ...]) -> NeuronAxis:
    names = {name for name, _ in layer.named_parameters()}
    for layout in candidates:
        if names.issuperset(layout.weights):
            return NeuronAxis(layer, layout.axis, layout)
    wanted = " or ".join(" + ".join((*layout.ins, layout.out)) for layout in candidates)
    raise InputError(f"a {type(layer).__name__} of the model has no MLP made of {wanted}")

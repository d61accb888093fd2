"""One pass of the teacher over a sample collects everything that the scores read.

Sums run over real tokens in float64, so the statistics do not depend on batch size, order, padding side or the number
of processes. Shapes: B examples, L positions, D hidden width, F MLP width, N layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.errors import InputError, RunError
from distill.models.layout import layers_of
from distill.models.mlp import See, mlps_of
from distill.models.outputs import Batch, first_tensor


@dataclass(frozen=True)
class Statistics:
    """Sums over the calibration tokens."""

    tokens: Tensor
    """[] number of real tokens."""
    abs_sum: list[Tensor]
    """Per layer [F]: sum of |activation| of each neuron."""
    square_sum: list[Tensor]
    """Per layer [F]: sum of squared activations."""
    cosine_sum: Tensor
    """[N]: sum of cos(layer input, layer output)."""

    def mean_abs(self, layer: int) -> Tensor:
        """[F] mean absolute activation of the layer's neurons."""
        return self.abs_sum[layer] / self.tokens

    def mean_square(self, layer: int) -> Tensor:
        """[F] mean squared activation of the layer's neurons."""
        return self.square_sum[layer] / self.tokens

    def block_influence(self) -> Tensor:
        """[N] 1 - mean cos(input, output) of each layer."""
        return 1 - self.cosine_sum / self.tokens

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        tensors = {"tokens": self.tokens, "cosine_sum": self.cosine_sum}
        for index, (absolute, square) in enumerate(zip(self.abs_sum, self.square_sum, strict=True)):
            tensors[f"layer.{index}.abs_sum"] = absolute
            tensors[f"layer.{index}.square_sum"] = square
        save_file(tensors, path, metadata={"format": "distill.calibration/1"})

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what `save` wrote. Raises InputError for any other file."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            layers = range(len(tensors["cosine_sum"]))
            return cls(
                tokens=tensors["tokens"],
                cosine_sum=tensors["cosine_sum"],
                abs_sum=[tensors[f"layer.{index}.abs_sum"] for index in layers],
                square_sum=[tensors[f"layer.{index}.square_sum"] for index in layers],
            )
        except Exception as error:
            if isinstance(error, (OSError, KeyError)) or type(error).__name__ == "SafetensorError":
                raise InputError(f"{path} is not a calibration file: {error}") from error
            raise


class _Collector:
    """Forward hooks on every layer and every MLP output projection; adds up masked sums."""

    def __init__(self, model: Any):
        layers, mlps = layers_of(model), mlps_of(model)
        device = next(model.parameters()).device
        self.abs_sum = [
            torch.zeros((*mlp.weight_out.shape[:-2], mlp.width), dtype=torch.float64, device=device) for mlp in mlps
        ]
        self.square_sum = [torch.zeros_like(total) for total in self.abs_sum]
        self.cosine_sum = torch.zeros(len(layers), dtype=torch.float64, device=device)
        self.mask = torch.empty(0)
        self.handles = [mlp.watch(self._mlp_hook(i)) for i, mlp in enumerate(mlps)]
        self.handles += [
            layer.register_forward_hook(self._layer_hook(i), with_kwargs=True) for i, layer in enumerate(layers)
        ]

    def _mlp_hook(self, index: int) -> See:
        def see(neurons: Tensor, positions: Tensor | None, expert: int) -> None:
            real = self.mask.flatten()
            neurons_TF = neurons[real if positions is None else real[positions]].double()
            own = expert if self.abs_sum[index].ndim == 2 else ...
            self.abs_sum[index][own] += neurons_TF.abs().sum(dim=0)
            self.square_sum[index][own] += neurons_TF.square().sum(dim=0)

        return see

    def _layer_hook(self, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            before_TD, after_TD = before[self.mask].double(), first_tensor(output)[self.mask].double()
            self.cosine_sum[index] += nn.functional.cosine_similarity(before_TD, after_TD, dim=-1).sum()

        return hook


@torch.no_grad()
def calibrate(model: Any, batches: Iterable[Batch]) -> Statistics:
    """Run the model once over the batches and collect the statistics of every layer.

    Raises:
        RunError: The sample has no real token, or an activation is not finite.
    """
    collector = _Collector(model)
    tokens = 0
    try:
        model.eval()
        for cpu_batch in batches:
            batch = {name: tensor.to(model.device) for name, tensor in cpu_batch.items()}
            collector.mask = batch["attention_mask"].bool()
            tokens += int(collector.mask.sum())
            # The base model is enough: the head's output is not looked at.
            model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        for handle in collector.handles:
            handle.remove()
    if tokens == 0:
        raise RunError("calibration saw no token: the sample is empty")
    statistics = Statistics(
        tokens=torch.tensor(float(tokens), dtype=torch.float64),
        abs_sum=[total.cpu() for total in collector.abs_sum],
        square_sum=[total.cpu() for total in collector.square_sum],
        cosine_sum=collector.cosine_sum.cpu(),
    )
    if not all(torch.isfinite(total).all() for total in [*statistics.square_sum, statistics.cosine_sum]):
        raise RunError("calibration met an activation that is not finite; is the teacher's dtype wide enough?")
    return statistics

"""The statistics of a teacher that one calibration pass collects. Every figure is a sum, so that ranks add up.

F width of a layer's MLP ([E, F] where it has E experts), N layers. A stack of layers is a `StackName`; methods that
take a layer speak of the stack that `of` chose, the main one at first.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.errors import InputError
from distill.models.layout import StackName

FORMAT = "distill.calibration/3"
NOT_ALWAYS_COLLECTED = {
    "gram": "products of neurons; set student.calibration.gram: true",
    "task": "gradients of the labels' loss; set student.calibration.gradients: true and give labelled examples",
    "kl": "gradients of the teacher's own predictions; set student.calibration.gradients: true",
    "without": "losses after removing each layer; they are collected where `loss_drop` is the recipe's policy",
    "removals": "layers in the order of their removal; it is collected where `greedy_loss` is the recipe's policy",
}
"""Group of figures that not every calibration has -> its meaning and the key that collects it."""


@dataclass(frozen=True)
class Statistics:
    """Sums over the real positions (or sequences, or examples) of a sample, in float64."""

    sums: dict[str, Tensor]
    """`SIDE.NAME` and `SIDE.LAYER.NAME` -> sum. Whole numbers (int64) are decisions, not sums."""
    side: StackName = "main"

    def of(self, side: StackName) -> Statistics:
        """Select the figures of a stack."""
        return replace(self, side=side)

    @property
    def tokens(self) -> Tensor:
        """[] real positions of the stack."""
        return self._sum("tokens")

    def positions(self, layer: int) -> Tensor:
        """[] positions that reached the layer's MLP; [E] those that were sent to each expert."""
        return self._sum("tokens", layer)

    def mean(self, layer: int) -> Tensor:
        """[F] mean activation of each neuron; of an expert's neurons, over the expert's own positions."""
        return self._mean("sum", layer)

    def mean_abs(self, layer: int) -> Tensor:
        """[F] mean absolute activation."""
        return self._mean("abs", layer)

    def mean_square(self, layer: int) -> Tensor:
        """[F] mean squared activation."""
        return self._mean("square", layer)

    def variance(self, layer: int) -> Tensor:
        """[F] variance of the activation (divided by the number of positions)."""
        return (self.mean_square(layer) - self.mean(layer).square()).clamp(min=0)

    def sequence_norm(self, layer: int) -> Tensor:
        """[F] sqrt(Σ over sequences of (mean |activation| within the sequence)²): Minitron's aggregation."""
        return self._sum("sequence_square", layer).sqrt()

    def gram(self, layer: int) -> Tensor:
        """[F, F] ([E, F, F]) mean product of each two neurons' activations."""
        return self._mean("gram", layer)

    def gate_gradient(self, kind: Literal["task_abs", "task_square", "kl_square"], layer: int) -> Tensor:
        """[F] mean over examples of |c| or c², c = Σ over positions of dL/dx · x, L their summed loss.

        `task`: over labelled examples, L of their labels; `kl`: over all, L of labels drawn from the teacher itself.
        """
        return self._sum(kind, layer) / self._sum(f"{kind.partition('_')[0]}_examples").clamp(min=1)

    def block_influence(self) -> Tensor:
        """[N] 1 - mean cos(input, output) of each layer."""
        return 1 - self._sum("cosine") / self.tokens

    def angular_distance(self) -> Tensor:
        """[N + 1, N + 1] mean of arccos(cos(h_i, h_j)) / π at each sequence's last real token.

        h_0 is the input of layer 0, h_i the raw output of layer i - 1.
        """
        return self._sum("angles") / self._sum("sequences")

    def loss_without(self) -> Tensor:
        """[N] mean loss of the labels after removing each layer alone."""
        return self._sum("without") / self._sum("without_positions").clamp(min=1)

    @property
    def removals(self) -> list[int]:
        """Layers in the order in which greedy removal took them."""
        order: list[int] = self._sum("removals").tolist()
        return order

    @property
    def fingerprint(self) -> str:
        """Sha256 over the names, shapes and values of all figures."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.sums.items()):
            digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write as safetensors: the same figures are the same bytes."""
        # One entry: safetensors writes several in any order, and another content would make the plan anew.
        metadata = {"calibration": json.dumps({"format": FORMAT, "fingerprint": self.fingerprint})}
        save_file({name: tensor.contiguous() for name, tensor in self.sums.items()}, path, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what `save` wrote. Raises InputError for any other file, and for one whose figures have changed."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get("calibration", "{}"))
                found = cls({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a mapping)
        except Exception as error:
            if isinstance(error, OSError | ValueError) or type(error).__name__ == "SafetensorError":
                raise InputError(f"{path} is not a calibration file: {error}") from error
            raise
        if metadata.get("format") != FORMAT or metadata.get("fingerprint") != found.fingerprint:
            raise InputError(f"{path} is not a calibration file, or not as it was written; calibrate again")
        return found

    def _mean(self, name: str, layer: int) -> Tensor:
        total, count = self._sum(name, layer), self.positions(layer).clamp(min=1)
        return total / count.reshape(*count.shape, *[1] * (total.ndim - count.ndim))

    def _sum(self, name: str, layer: int | None = None) -> Tensor:
        key = f"{self.side}.{name}" if layer is None else f"{self.side}.{layer}.{name}"
        if key not in self.sums:
            what = NOT_ALWAYS_COLLECTED.get(name.partition("_")[0], f"the figure {key}; was it made for another model?")
            raise InputError(f"the calibration does not hold {what}")
        return self.sums[key]


def require(statistics: Statistics | None, strategy: str) -> Statistics:
    """Return the statistics; raises InputError when there are none for a score or policy of this name."""
    if statistics is None:
        raise InputError(f"student: `{strategy}` needs calibration data; pass the Statistics of a calibration")
    return statistics

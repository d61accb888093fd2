"""One pass of the teacher over a sample collects everything that scores, policies and allocations read.

Sums run over real positions in float64, so the statistics do not depend on batch size, order, padding or the number of
ranks. Shapes: B examples, L positions, D hidden width, F MLP width, N layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distill.errors import InputError, RunError
from distill.models.family import layers_of, layout_of
from distill.models.forward import UNLABELLED, Batch, first_tensor, layer_input, run_base, with_decoder_inputs
from distill.models.layout import StackName
from distill.models.mlp import mlps_of
from distill.models.precision import autocast_for
from distill.recipe.schema import Layers
from distill.student.calibration.gradients import gradient_sums
from distill.student.calibration.removal import LabelLoss, greedy_removals, losses_without
from distill.student.calibration.sample import pad_right, real_positions
from distill.student.calibration.statistics import Statistics

Reduce = Callable[[Tensor], Tensor]
"""Adds a tensor up over all ranks."""


@dataclass(frozen=True)
class StatisticsRequest:
    """Statistics to collect beyond those of every calibration."""

    gram: bool = False
    """Products of each two neurons: F² numbers per layer."""
    gradients: bool = False
    """One backward pass per example and kind (labels, teacher's own predictions)."""
    losses_without: tuple[StackName, ...] = ()
    """Stacks whose layers are removed one at a time: N passes each."""
    removals: dict[StackName, Layers] = field(default_factory=dict)
    """Stacks whose layers are removed greedily: up to N passes for each layer removed."""


def calibrate(
    model: Any,
    batches: Iterable[Batch],
    wanted: StatisticsRequest | None = None,
    loss: LabelLoss | None = None,
    reduce: Reduce = lambda total: total,
    sets: bool = False,
    precision: str = "fp32",
) -> Statistics:
    """Run the model over the batches and collect the statistics of every layer; the model is left as it was.

    Args:
        model: A transformers model of a known family.
        batches: As `distill.student.calibration.sample` describes them; with labels where a loss is asked for.
        wanted: Statistics beyond the sums that one forward pass gives.
        loss: (outputs, batch) -> the labels' loss summed over valid positions, and their number.
        reduce: With several ranks, each with its own batches: adds a tensor up over them.
        sets: Each class of the model is a yes or no of its own.
        precision: Of the recipe, which fp32 weights are multiplied in; sums are in float64 all the same.

    Raises:
        RunError: The sample has no real token, or an activation is not finite.
        InputError: A loss is asked for and no example has a label.
    """
    wanted = wanted or StatisticsRequest()
    sample = [pad_right(with_decoder_inputs(model, batch), sets) for batch in batches]
    with _frozen(model):
        collectors = [_Collector(model, side, wanted.gram) for side in layout_of(model).sides]

        def note_masks(batch: Batch) -> None:
            for collector in collectors:
                collector.given = real_positions(batch, collector.side)

        with autocast_for(model, precision):
            run_base(model, sample, [handle for collector in collectors for handle in collector.watch()], note_masks)
        sums = {name: total for collector in collectors for name, total in collector.sums.items()}
        if wanted.gradients:
            sums |= gradient_sums(model, sample, loss, sets, precision)
        decisions: dict[str, Tensor] = {}
        if wanted.losses_without or wanted.removals:
            label_loss = _require_labels(loss, sample, reduce, model.device)
            with autocast_for(model, precision):
                for side in wanted.losses_without:
                    sums |= losses_without(model, side, sample, label_loss)
                for side, removals in wanted.removals.items():
                    order = greedy_removals(model, side, sample, label_loss, removals, reduce)
                    decisions[f"{side}.removals"] = torch.tensor(order, dtype=torch.int64)
        sums = {name: reduce(total) for name, total in sorted(sums.items())} | decisions
    statistics = Statistics({name: total.cpu() for name, total in sums.items()})
    if statistics.tokens == 0:
        raise RunError("calibration saw no token: the sample is empty")
    if not all(torch.isfinite(total).all() for total in statistics.sums.values()):
        raise RunError("calibration met an activation that is not finite; is the teacher's dtype wide enough?")
    return statistics


def _require_labels(loss: LabelLoss | None, sample: list[Batch], reduce: Reduce, device: torch.device) -> LabelLoss:
    labelled = sum(int((batch["labels"] != UNLABELLED).sum()) for batch in sample if "labels" in batch)
    if loss is None or reduce(torch.tensor(float(labelled), device=device)) == 0:
        raise InputError(
            "student.layers.choose: losses after removing layers need labels, and no example of the calibration sample "
            "has one; raise student.calibration.examples, or choose another policy"
        )
    return loss


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode without gradients for the block; afterwards all is as it was."""
    training = {module: module.training for module in model.modules()}
    learning = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, learns in learning.items():
            parameter.requires_grad_(learns)


class _Collector:
    """Hooks on every layer and every MLP of one stack; adds up sums over real positions."""

    def __init__(self, model: Any, side: StackName, gram: bool):
        self.side, self.layers, self.mlps = side, layers_of(model, side), mlps_of(model, side)
        self.given: Tensor | None = None
        """Mask of the batch as given; None: every position is real."""
        self.mask = torch.empty(0)
        """Boolean [B, L], known once the first layer is reached."""
        self.ends: list[Tensor] = []
        """[B, D] each: the last real position's state before the first layer and after each."""
        depth = len(self.layers)
        shapes: dict[str, tuple[int, ...]] = {"tokens": (), "sequences": ()}
        shapes |= {"cosine": (depth,), "angles": (depth + 1, depth + 1)}
        for index, mlp in enumerate(self.mlps):
            experts = tuple(mlp.weight_out.shape[:-2])
            shapes[f"{index}.tokens"] = experts
            shapes |= {f"{index}.{name}": (*experts, mlp.width) for name in ("sum", "abs", "square", "sequence_square")}
            if gram:
                shapes[f"{index}.gram"] = (*experts, mlp.width, mlp.width)
        zeros = partial(torch.zeros, dtype=torch.float64, device=next(model.parameters()).device)
        self.sums: dict[str, Tensor] = {f"{side}.{name}": zeros(shape) for name, shape in shapes.items()}

    def watch(self) -> list[RemovableHandle]:
        """Attach the hooks."""
        handles = [self.layers[0].register_forward_pre_hook(self._begin, with_kwargs=True)]
        for index, (layer, mlp) in enumerate(zip(self.layers, self.mlps, strict=True)):
            handles.append(layer.register_forward_hook(partial(self._on_layer, index), with_kwargs=True))
            handles.append(mlp.watch(partial(self._on_neurons, f"{self.side}.{index}")))
        return handles

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = layer_input(args, kwargs)
        length = states.shape[1]
        self.mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        if self.given is not None:  # a speech encoder has fewer positions than its input has frames
            self.mask = self.given[:, :: self.given.shape[1] // length]
        self.sums[f"{self.side}.tokens"] += self.mask.sum()
        self.sums[f"{self.side}.sequences"] += self.mask.any(dim=1).sum()
        self.ends = [self._end(states)]

    def _end(self, states: Tensor) -> Tensor:
        last = self.mask.sum(dim=1).sub(1).clamp(min=0)
        return states[torch.arange(len(states), device=states.device), last][self.mask.any(dim=1)].double()

    def _on_layer(
        self, index: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        # Raw outputs, from hooks: the last entry of `hidden_states` would be after the final norm.
        before, after = layer_input(args, kwargs), first_tensor(output)
        before_TD, after_TD = before[self.mask].double(), after[self.mask].double()
        cosines = nn.functional.cosine_similarity(before_TD, after_TD, dim=-1)
        self.sums[f"{self.side}.cosine"][index] += cosines.sum()
        self.ends.append(self._end(after))
        if len(self.ends) > len(self.layers):
            self._add_angles()

    def _add_angles(self) -> None:
        """Add the angles between the states before and after this batch's layers."""
        states_BND = nn.functional.normalize(torch.stack(self.ends, dim=1), dim=-1)
        cosines = (states_BND @ states_BND.mT).clamp(-1, 1)
        angles = cosines.arccos() / pi
        angles.diagonal(dim1=-2, dim2=-1).zero_()  # arccos is steep at 1: rounding would show as an angle
        self.sums[f"{self.side}.angles"] += angles.sum(dim=0)

    def _on_neurons(self, prefix: str, neurons: Tensor, positions: Tensor | None, expert: int) -> None:
        """Add the neurons of T real positions; `where` [T] are their indices in the flat batch."""
        rows, length = self.mask.shape
        real = self.mask.flatten()
        entry: Any = expert
        if positions is None:  # an MLP without experts
            positions, entry = torch.arange(len(real), device=real.device), ()
        where, values_TF = positions[real[positions]], neurons[real[positions]].float()
        absolute, sequence = values_TF.abs(), where // length
        by_sequence = torch.zeros(rows, values_TF.shape[1], device=values_TF.device).index_add_(0, sequence, absolute)
        lengths = torch.bincount(sequence, minlength=rows).clamp(min=1).double()
        totals = {
            "tokens": torch.tensor(len(values_TF)),
            "sum": values_TF.sum(dim=0, dtype=torch.float64),
            "abs": absolute.sum(dim=0, dtype=torch.float64),
            "square": values_TF.square().sum(dim=0, dtype=torch.float64),
            "sequence_square": (by_sequence.double() / lengths[:, None]).square().sum(dim=0),
        }
        if f"{prefix}.gram" in self.sums:
            wide = values_TF.double()
            totals["gram"] = wide.T @ wide
        for name, total in totals.items():
            self.sums[f"{prefix}.{name}"][entry] += total

"""The time of a step, from products that are timed on the device: a few layers of true shapes, the loss, the optimizer.

All run the code that trains. Depth alone is left out: a model with one layer and one with three tell what a layer
takes, and others take it in proportion to their parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.losses import PREDICTION_KINDS, Objective
from distill.models.cost import least_seconds, random_batch
from distill.models.family import all_layers, layers_of, layout_of
from distill.models.forward import Batch, Capture, Outputs, forward, to_device, without_cache
from distill.pipeline.cached_columns import as_kept
from distill.pipeline.rehearsal import Rehearsal, autocast
from distill.student import build_student
from distill.student.draw import exact_plan
from distill.teacher import LiveTeacher
from distill.training.compiled import CompiledLayers, is_compilers, is_wanted
from distill.training.model import DistillModel
from distill.training.optim import make_optimizer

FEW, MORE = 1, 3
"""Layers of each stack of the two models that the time of a layer is found from."""
DECODE_TURNS = 15
GAIN = 0.95
"""Depth is named where it takes less than this share of the time."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one process for one step."""

    teacher: float
    student: float
    """Forward and backward passes."""
    loss: float
    optimizer: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.teacher + self.student + self.loss + self.optimizer

    def scaled(self, share: float) -> StepTime:
        """Return the time of a step whose passes read so many times the tokens."""
        return StepTime(share * self.teacher, share * self.student, share * self.loss, self.optimizer)


def rehearse_time(training: Rehearsal, device: torch.device) -> StepTime:
    """Time the products of a step on the device, with real weights of a few layers and true shapes.

    Each stack is timed with one layer and with three, in turns; compiled where the training compiles layers.
    """
    if is_wanted(training.spec.compile, device):
        try:
            return _rehearse(training, device, compiles=True)
        except Exception as error:
            if not is_compilers(error):
                raise
    return _rehearse(training, device, compiles=False)


def _rehearse(training: Rehearsal, device: torch.device, *, compiles: bool) -> StepTime:
    batch = to_device(training.batch, device)
    whole = training.objective(training.terms)
    models = [model for model in training.hollow() if model is not None]
    shallow = [[_shallow(model, depth) for depth in (FEW, MORE)] for model in models]
    sizes = [[_layer_size(model) for model in (*pair, full)] for pair, full in zip(shallow, models, strict=True)]
    with torch.device("meta"):
        training.freeze(models[0])
    learning = _learning(models[0])
    students, *teachers = [[_materialize(model, device) for model in pair] for pair in shallow]
    if compiles:
        made = [layer for pair in (students, *teachers) for model in pair for layer in all_layers(model)]
        CompiledLayers(training.title, lambda _line: None).compile(made)
    taught = 0.0
    for pair in teachers:
        lone = [LiveTeacher(model, Capture(stop_at_head=True), device) for model in pair]
        if training.cached is None:
            few, more = _seconds([partial(each, batch) for each in lone], device)
            taught = extrapolate(few, more, sizes[1])
    wrappers = [training.prepare(model, teachers[0][0] if teachers else None, training.terms) for model in students]
    few, more = _seconds([partial(_both_ways, training, model, batch, device) for model in students], device)
    own = extrapolate(few, more, sizes[0])
    compared = [_outputs(students[0], batch, whole.student, learns=True)]
    compared += [_outputs(pair[0], batch, whole.teacher, learns=False) for pair in teachers]
    if training.cached and compared[1:]:
        compared[1] = as_kept(compared[1], training.cached)
    (loss,) = _seconds([partial(_compare, training, wrappers[0].objective, compared, batch, device)], device)
    share = learning / _learning(students[-1])
    optimizer = _step_seconds(training, wrappers[-1], device) * share
    passes = training.passes
    return StepTime(passes * taught, passes * own, passes * loss, optimizer)


def _shallow(model: Any, depth: int) -> Any:
    """Make the same model with the first layers of each stack."""
    layout = layout_of(model)
    plan = exact_plan(model, {side: [*range(min(depth, len(layers_of(model, side))))] for side in layout.sides})
    with torch.device("meta"):
        return build_student(model, plan)


def _layer_size(model: Any) -> int:
    return sum(parameter.numel() for layer in all_layers(model) for parameter in layer.parameters())


def _learning(model: Any) -> int:
    """Count the parameters that learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _materialize(model: Any, device: torch.device) -> Any:
    """Give a model without weights random ones, on a device."""
    model.to_empty(device=device)
    model.init_weights()
    return model


def extrapolate(few: float, more: float, sizes: Sequence[int]) -> float:
    """Compute the seconds of a model from those of two shallow ones; `sizes` are parameters in layers, its own last."""
    if sizes[1] == sizes[0]:
        return more
    return more + max(0.0, more - few) / (sizes[1] - sizes[0]) * (sizes[2] - sizes[1])


def _seconds(passes: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Time passes in turns."""
    return list(least_seconds({str(number): each for number, each in enumerate(passes)}, device).values())


def _both_ways(training: Rehearsal, model: Any, batch: Batch, device: torch.device) -> None:
    """Run a forward and a backward pass up to the head, or whole where the head is part of the model."""
    with autocast(training.spec, device):
        own = forward(model, batch, Capture(stop_at_head=PREDICTION_KINDS[training.kind].vocabulary))
    end = own.last if own.logits is None else own.logits
    assert end is not None
    end.backward(torch.ones_like(end))  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.grad = None


def _outputs(model: Any, batch: Batch, capture: Capture, *, learns: bool) -> Outputs:
    """Build the outputs of one model that the objective reads; those of its first layer stand in for all layers."""
    layers = [each.name for each in fields(capture) if each.name != "stop_at_head" and getattr(capture, each.name)]
    first = Capture(**{name: (0,) for name in layers}, stop_at_head=capture.stop_at_head)
    with torch.no_grad():
        found = forward(model, batch, first)

    def leaf(value: Any) -> Any:
        return [leaf(each) for each in value] if isinstance(value, list) else value.detach().requires_grad_(learns)

    made: dict[str, Any] = {
        name: {layer: leaf(getattr(found, name)[0]) for layer in getattr(capture, name)} for name in layers
    }
    ends = {name: leaf(value) for name in ("logits", "last") if (value := getattr(found, name)) is not None}
    return replace(found, **made, **ends)


def _compare(
    training: Rehearsal, objective: Objective, sides: Sequence[Outputs], batch: Batch, device: torch.device
) -> None:
    """Compute the loss and its gradient."""
    with autocast(training.spec, device):
        loss = objective(sides[0], sides[1] if sides[1:] else None, batch, objective.counts([batch]))[0]
    loss.backward()  # type: ignore[no-untyped-call]


def _step_seconds(training: Rehearsal, wrapper: DistillModel, device: torch.device) -> float:
    """Time clipping and the optimizer's step."""
    for parameter in wrapper.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    halves = [each for each in wrapper.parameters() if each.requires_grad and each.dtype == torch.bfloat16]
    rests: dict[Tensor, Tensor] = {each: torch.zeros(each.shape, dtype=torch.int16, device=device) for each in halves}
    optimizer = make_optimizer(wrapper, training.spec, rests or None)
    average = training.average(wrapper)

    def step() -> None:
        nn.utils.clip_grad_norm_(wrapper.parameters(), training.spec.max_grad_norm or float("inf"))
        optimizer.step()
        if average is not None:
            average.update(1, torch.zeros((), device=device))

    return _seconds([step], device)[0]


def advise_depth(student: Any, teacher: Any, length: int | None, device: torch.device) -> str | None:
    """Say what whole layers would bring in the place of as many parameters in narrow ones; None where nothing.

    Args:
        student: With narrower MLPs, on the meta device.
        teacher: The same.
        length: Tokens of the one example that is read; None: one token, as in decoding.
        device: Where it is timed.
    """
    sizes = [_layer_size(model) / len(all_layers(model)) for model in (student, teacher)]
    depth = len(all_layers(student))
    whole_layers = int(depth * sizes[0] / sizes[1])
    if depth <= FEW or not 0 < whole_layers < depth:
        return None
    passes = {}
    for name, model in (("narrow", student), ("whole", teacher)):
        for layers in (FEW, MORE):
            shallow = _materialize(_shallow(model, layers), device).eval()
            passes[f"{name} {layers}"] = partial(_read, shallow, random_batch(shallow, (1, length or 1)))
    seconds = least_seconds(passes, device, DECODE_TURNS)
    narrow, whole = (max(0.0, seconds[f"{name} {MORE}"] - seconds[f"{name} {FEW}"]) for name in ("narrow", "whole"))
    if not whole or whole_layers * whole >= GAIN * depth * narrow:
        return None
    what = "decoding one token" if length is None else f"for one example of {length} tokens"
    return (
        f"depth before width: {what}, a cut layer takes {narrow / whole:.0%} of a whole one's time, with "
        f"{sizes[0] / sizes[1]:.0%} of its parameters; {whole_layers} whole layers have no more parameters than these "
        f"{depth} and would take {whole_layers * whole / (depth * narrow):.0%} of their time"
    )


@torch.inference_mode()
def _read(model: Any, inputs: Batch) -> None:
    model(**inputs, **without_cache(model))

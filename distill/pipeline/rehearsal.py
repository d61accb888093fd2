"""One training, rehearsed: its memory on fake tensors, its time with a few layers on the device.

Both run the code that trains: teacher, student, objective and optimizer as the recipe has them. What is left out is the
depth, for the time, and the positions, for the loss of a vocabulary: time grows evenly with the layers, and the memory
of that loss with the positions.

B examples, L positions, N positions with a prediction, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from distill.losses import MATCHES, PREDICTION_KINDS, Maps, Objective
from distill.losses.chunked import BLOCK, chunk_size
from distill.models.cost import least_seconds
from distill.models.family import all_layers, layers_of, layout_of
from distill.models.forward import UNLABELLED, Batch, Capture, Outputs, forward, to_device
from distill.models.head import OutputHead, output_head
from distill.models.layout import StackName
from distill.models.memory import MemoryTrace, Peak, make_fake, tracing
from distill.models.sentence import unused_parameters
from distill.models.trainable import freeze
from distill.pipeline.build import plan_of_whole
from distill.pipeline.session import DTYPES
from distill.recipe.schema import Optimization, Term
from distill.student import build_student
from distill.teacher import LiveTeacher
from distill.training.ema import Ema
from distill.training.learner import gradient_checkpointing
from distill.training.model import DistillModel
from distill.training.optim import OPTIMIZERS, make_optimizer

HERE = torch.device("cpu")
EIGHT_BIT_BLOCK, EIGHT_BIT_FROM = 256, 4096
"""Weights that share one scale of an 8-bit moment, and the fewest of a parameter that has such; as in bitsandbytes."""
FEW, MORE = 1, 3
"""Layers of each stack of the two models that the time of a layer is found from."""


@dataclass(frozen=True)
class Rehearsal:
    """One training of a recipe: all that its memory and its time depend on."""

    title: str
    spec: Optimization
    """Its section of the recipe."""
    build: Callable[[], Any]
    """Makes the model that is trained, in the dtype that it is trained in, without caring for values."""
    teacher: Callable[[], Any] | None
    """Makes the teacher in the dtype that it computes in; None: no term needs one."""
    terms: Sequence[Term]
    kind: str
    """Kind of predictions."""
    batch: Batch
    """The widest micro-batch."""
    passes: int
    """Micro-batches of one process in a step."""
    maps: Maps | None = None
    encoder_maps: Maps | None = None
    vocabulary: int | None = None
    teacher_elsewhere: bool = False
    """The teacher is not on the device that the student is on."""

    def objective(self, terms: Sequence[Term], chunk: int | None = None) -> Objective:
        """Make an objective of some of the terms."""
        return Objective(terms, self.kind, self.maps, self.vocabulary, chunk, self.encoder_maps)

    @property
    def narrow(self) -> bool:
        """True where micro-batches may have fewer examples without another result."""
        return not PREDICTION_KINDS[self.kind].vectors

    def with_spec(self, **changes: Any) -> Rehearsal:
        """Return the training with other values in its section; fewer examples per pass are the longest ones."""
        spec = self.spec.model_copy(update=changes)
        rows, before = spec.micro_batch_size, self.spec.micro_batch_size
        if rows is None or rows == before or before is None:
            return replace(self, spec=spec)
        batch = {name: tensor[:rows] for name, tensor in self.batch.items()}
        return replace(self, spec=spec, batch=batch, passes=self.passes * -(-before // rows))

    def hollow(self) -> tuple[Any, Any | None]:
        """Make the model that is trained and the teacher without weights."""
        with torch.device("meta"), no_init_weights():
            return self.build(), None if self.teacher is None else self.teacher()

    def freeze(self, student: Any) -> None:
        """Hold a model as the training does, and choose what learns of it: parameters, or adapters."""
        if self.spec.weights == "bf16":
            student.to(torch.bfloat16)
        if self.spec.lora is None:
            freeze(student, [*self.spec.freeze, *unused_parameters(student)], self.spec.only)
            return
        from distill.training.lora import Adapters

        Adapters(student, self.spec.lora)
        for name, module in student.named_modules():
            if name.endswith(("lora_A", "lora_B")):
                module.float()

    def prepare(self, student: Any, teacher: Any | None, terms: Sequence[Term]) -> DistillModel:
        """Freeze, wrap and set up the models as the training does."""
        self.freeze(student)
        objective = self.objective(terms)
        if teacher is not None:
            objective.project(student.config.hidden_size, teacher.config.hidden_size)
        for each in (student, teacher) if objective.student.attention else ():
            each.set_attn_implementation("eager")
        if self.spec.gradient_checkpointing:
            gradient_checkpointing(student, "enable")({"use_reentrant": False})
        return DistillModel(student, objective).train()


@contextmanager
def autocast(spec: Optimization, device: torch.device) -> Iterator[None]:
    """Compute in the precision of a training, as Accelerate does."""
    with torch.autocast(device.type, DTYPES[spec.precision], enabled=spec.precision != "fp32"):
        yield


def rehearse_memory(training: Rehearsal, device: torch.device) -> Peak:
    """Find the most memory that a step takes on one device, and what it is made of; nothing is computed.

    Parts: `weights`, `gradients`, `optimizer`, `average`, `teacher`, `activations` (with what passes take for a while),
    `loss` (logits and gradients of a vocabulary head).

    Args:
        training: The training, on one process.
        device: Decides how many positions the loss has at once; it need not be there.
    """
    student, teacher = training.hollow()
    heads = [output_head(model) for model in (student, teacher) if model is not None]
    apart = heads[0] is not None and PREDICTION_KINDS[training.kind].vocabulary
    # The loss of a vocabulary is looked at apart: nothing of it is left in the step but the gradient of the head.
    left = [term for term in training.terms if not (apart and MATCHES[term.match].on_logits)]
    with torch.device("meta"):
        wrapper = training.prepare(student, teacher, left or [Term(match="labels")])
    with tracing() as trace:
        trace.fill("weights")
        make_fake(wrapper)
        if teacher is not None:
            trace.fill("elsewhere" if training.teacher_elsewhere else "teacher")
            make_fake(teacher)
        before = _trace_step(training, wrapper, teacher, bool(left), trace)
        peaks = list(trace.peaks.values())
    if apart:
        peaks.append(Peak({**before, "loss": _loss_bytes(training, heads, device)}, "the loss"))
    on_device = [replace(peak, parts={**peak.parts, "elsewhere": 0}) for peak in peaks]
    return max(on_device, key=lambda peak: peak.total)


def _trace_step(
    training: Rehearsal, wrapper: DistillModel, teacher: Any | None, scored: bool, trace: MemoryTrace
) -> dict[str, int]:
    """Take a step; returns what is there before the loss.

    Args:
        training: The training.
        wrapper: Fake student, with the objective of this step.
        teacher: Fake.
        scored: The objective has terms of its own; else no position has a label.
        trace: Counts.
    """
    whole, objective = training.objective(training.terms), wrapper.objective
    batch = {name: trace.known(tensor) for name, tensor in training.batch.items()}
    labelled = batch if scored else {**batch, "labels": batch["labels"] * 0 + UNLABELLED}
    state, average = _fill_state(training, wrapper, trace)
    trace.peaks.clear()
    trace.fill("activations", "the teacher's pass")
    given = LiveTeacher(teacher, whole.teacher, HERE)(batch) if teacher is not None else None
    trace.fill("activations", "the forward pass")
    with autocast(training.spec, HERE):
        own = forward(wrapper.student, batch, whole.student)
        before = dict(trace.bytes)
        trace.fill("activations", "the loss")
        loss = objective(own, given, labelled, objective.counts([labelled]))[0]
    del own, given
    trace.fill("activations", "the backward pass")
    loss.backward()
    del loss
    _take_step(training, wrapper, average, trace)
    del state
    return before


def _fill_state(training: Rehearsal, wrapper: DistillModel, trace: MemoryTrace) -> tuple[list[Tensor], Ema | None]:
    """Bring a training to its second step, or within one that accumulates: state, average and gradients are there."""
    learning = [parameter for parameter in wrapper.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.register_post_accumulate_grad_hook(lambda own: trace.move([own.grad], "gradients"))
    trace.fill("optimizer")
    state = [torch.empty(state_bytes(training.spec, each), dtype=torch.uint8) for each in learning]
    if training.spec.optimizer not in OPTIMIZERS:
        state = _state_of_own(training, wrapper, learning)
    trace.fill("average")
    average = Ema(wrapper, training.spec.ema, _widen) if training.spec.ema is not None else None
    trace.fill("gradients")
    for parameter in learning if training.passes > 1 else ():
        parameter.grad = torch.zeros_like(parameter)
    return state, average


def state_bytes(spec: Optimization, parameter: Tensor) -> int:
    """Count the bytes that a built-in optimizer keeps of a parameter: two moments, and the rest of a bf16 weight."""
    count = parameter.numel()
    half = parameter.dtype == torch.bfloat16
    if spec.optimizer == "adamw_8bit":
        scales = -(-count // EIGHT_BIT_BLOCK)
        moments = 2 * count + 8 * scales if count >= EIGHT_BIT_FROM else 8 * count
    else:
        moments = 4 * count if half else 8 * count
    return moments + 2 * count * half


def _state_of_own(training: Rehearsal, wrapper: DistillModel, learning: Sequence[Tensor]) -> list[Tensor]:
    """Let a user's own optimizer make its state by a step."""
    optimizer = make_optimizer(wrapper, training.spec)
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in learning:
        parameter.grad = None
    return [value for own in optimizer.state.values() for value in own.values() if isinstance(value, Tensor)]


def _widen(parameter: Tensor) -> Tensor:
    return parameter.detach().float()


def _take_step(training: Rehearsal, wrapper: DistillModel, average: Ema | None, trace: MemoryTrace) -> None:
    trace.fill("activations", "the optimizer's step")
    nn.utils.clip_grad_norm_(wrapper.parameters(), training.spec.max_grad_norm or float("inf"))
    if average is not None:
        average.update(1, torch.zeros(()))


def _loss_bytes(training: Rehearsal, heads: Sequence[OutputHead | None], device: torch.device) -> int:
    """Count the bytes of the loss of a vocabulary: even in its positions and in those whose logits are there at once."""
    indices = [index for index, term in enumerate(training.terms) if MATCHES[term.match].on_logits]
    if not indices:
        return 0
    terms, known = [training.terms[index] for index in indices], [head for head in heads if head is not None]
    positions = int(training.objective(training.terms).counts([training.batch])[indices].max())
    vocabulary = max(len(head.weight) for head in known)
    few, chunk = max(1, BLOCK["cpu"] // vocabulary), min(positions, chunk_size(vocabulary, device))
    sizes = ((2 * few, few), (4 * few, few), (4 * few, 2 * few))
    start, longer, larger = (_loss_bytes_at(training, terms, known, *size) for size in sizes)
    per_position, per_chunk = (longer - start) / (2 * few), (larger - longer) / few
    fixed = start - per_position * 2 * few - per_chunk * few
    return int(fixed + per_position * positions + per_chunk * chunk)


def _loss_bytes_at(
    training: Rehearsal, terms: Sequence[Term], heads: Sequence[OutputHead], positions: int, chunk: int
) -> int:
    """Count the bytes of the loss at so many positions, so many at once."""
    objective, sides = training.objective(terms, chunk), []
    ids = torch.zeros(1, positions + 1, dtype=torch.int64)
    full = {"labels": ids, "attention_mask": ids + 1}
    with tracing() as trace:
        for number, head in enumerate(heads):
            weight = torch.empty(head.weight.shape, dtype=head.weight.dtype, requires_grad=head.weight.requires_grad)
            bias = None if head.bias is None else torch.empty(head.bias.shape, dtype=head.bias.dtype)
            last = torch.empty(1, positions + 1, weight.shape[1], dtype=weight.dtype, requires_grad=number == 0)
            sides.append(Outputs(None, last=last, head=replace(head, weight=weight, bias=bias)))
        batch = {name: trace.known(values) for name, values in full.items()}
        counts, at_rest = objective.counts([batch]), trace.bytes.total()
        trace.fill("loss", "the loss")
        objective(sides[0], sides[1] if sides[1:] else None, batch, counts)
        return trace.peaks["the loss"].total - at_rest


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


def rehearse_time(training: Rehearsal, device: torch.device) -> StepTime:
    """Time the products of a step on the device, with real weights of a few layers and true shapes.

    Each stack is timed with one layer and with three, in turns; what a layer takes is half of the difference, and others
    take it in proportion to their parameters.
    """
    batch = to_device(training.batch, device)
    whole = training.objective(training.terms)
    models = [model for model in training.hollow() if model is not None]
    shallow = [[_shallow(model, depth) for depth in (FEW, MORE)] for model in models]
    sizes = [[_layer_size(model) for model in (*pair, full)] for pair, full in zip(shallow, models, strict=True)]
    with torch.device("meta"):
        training.freeze(models[0])
    learning = _learning(models[0])
    students, *teachers = [[_materialize(model, device) for model in pair] for pair in shallow]
    taught = 0.0
    for pair in teachers:
        lone = [LiveTeacher(model, Capture(stop_at_head=True), device) for model in pair]
        taught = _extrapolate([partial(each, batch) for each in lone], sizes[1], device)
    wrappers = [training.prepare(model, teachers[0][0] if teachers else None, training.terms) for model in students]
    both = [partial(_both_ways, training, model, batch, device) for model in students]
    own = _extrapolate(both, sizes[0], device)
    compared = [_outputs(model, batch, capture, number == 0) for number, (model, capture) in enumerate(
        [(students[0], whole.student), *((pair[0], whole.teacher) for pair in teachers)]
    )]
    loss = least_seconds({"loss": partial(_compare, training, wrappers[0].objective, compared, batch, device)}, device)["loss"]
    share = learning / _learning(students[-1])
    optimizer = _step_seconds(training, wrappers[-1], device) * share
    passes = training.passes
    return StepTime(passes * taught, passes * own, passes * loss, optimizer)


def _shallow(model: Any, depth: int) -> Any:
    """Make the same model with the first layers of each stack."""
    layout = layout_of(model)
    kept: dict[StackName, list[int]] = {side: list(range(min(depth, len(layers_of(model, side))))) for side in layout.sides}
    plan = plan_of_whole(model, kept)
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


def _extrapolate(passes: Sequence[Callable[[], object]], sizes: Sequence[int], device: torch.device) -> float:
    """Compute the seconds of a model from those of two shallow ones; `sizes` are parameters in layers, its own last."""
    few, more = least_seconds(dict(zip(("few", "more"), passes, strict=True)), device).values()
    if sizes[1] == sizes[0]:
        return more
    each = max(0.0, more - few) / (sizes[1] - sizes[0])
    return more + each * (sizes[2] - sizes[1])


def _both_ways(training: Rehearsal, model: Any, batch: Batch, device: torch.device) -> None:
    """Run a forward and a backward pass up to the head, or whole where the head is part of the model."""
    with autocast(training.spec, device):
        own = forward(model, batch, Capture(stop_at_head=PREDICTION_KINDS[training.kind].vocabulary))
    end = own.last if own.logits is None else own.logits
    assert end is not None
    end.backward(torch.ones_like(end))
    for parameter in model.parameters():
        parameter.grad = None


def _outputs(model: Any, batch: Batch, capture: Capture, learns: bool) -> Outputs:
    """Make what the objective reads of one side: that of the first layer stands for all layers."""
    layers = [each.name for each in fields(capture) if each.name != "stop_at_head" and getattr(capture, each.name)]
    first = Capture(**{name: (0,) for name in layers}, stop_at_head=capture.stop_at_head)
    with torch.no_grad():
        found = forward(model, batch, first)

    def leaf(value: Any) -> Any:
        return [leaf(each) for each in value] if isinstance(value, list) else value.detach().requires_grad_(learns)

    made = {name: {layer: leaf(getattr(found, name)[0]) for layer in getattr(capture, name)} for name in layers}
    ends = {name: leaf(value) for name in ("logits", "last") if (value := getattr(found, name)) is not None}
    return replace(found, **made, **ends)


def _compare(
    training: Rehearsal, objective: Objective, sides: Sequence[Outputs], batch: Batch, device: torch.device
) -> None:
    """Compute the loss and its gradient."""
    with autocast(training.spec, device):
        loss = objective(sides[0], sides[1] if sides[1:] else None, batch, objective.counts([batch]))[0]
    loss.backward()


def _step_seconds(training: Rehearsal, wrapper: DistillModel, device: torch.device) -> float:
    """Time clipping and the optimizer's step."""
    for parameter in wrapper.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    halves = [each for each in wrapper.parameters() if each.requires_grad and each.dtype == torch.bfloat16]
    rests = {each: torch.zeros(each.shape, dtype=torch.int16, device=device) for each in halves}
    optimizer = make_optimizer(wrapper, training.spec, rests or None)
    average = Ema(wrapper, training.spec.ema, _widen) if training.spec.ema is not None else None

    def step() -> None:
        nn.utils.clip_grad_norm_(wrapper.parameters(), training.spec.max_grad_norm or float("inf"))
        optimizer.step()
        if average is not None:
            average.update(1, torch.zeros((), device=device))

    return least_seconds({"step": step}, device)["step"]

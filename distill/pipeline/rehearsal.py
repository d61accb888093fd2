"""One training, rehearsed on fake tensors: the most memory that a step takes, and what it is made of.

What runs is the code that trains: teacher, student, objective and optimizer as the recipe has them. Only the loss of a
vocabulary is looked at for a few positions, as its memory grows evenly with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from distill.losses import MATCHES, PREDICTION_KINDS, Maps, Objective
from distill.losses.chunked import chunk_size
from distill.losses.slopes import BLOCK
from distill.models.family import all_layers, use_eager_attention
from distill.models.forward import UNLABELLED, Batch, Outputs, forward, row_count
from distill.models.fp8 import MULTIPLE
from distill.models.head import OutputHead, output_head
from distill.models.memory import MemoryTrace, Peak, make_fake, tracing
from distill.models.precision import DTYPES
from distill.models.sentence import unused_parameters
from distill.models.trainable import freeze
from distill.pipeline.cached_columns import as_kept
from distill.recipe.cache import TeacherCache
from distill.recipe.schema import Optimization, Term
from distill.teacher import LiveTeacher
from distill.training.ema import Ema
from distill.training.learner import gradient_checkpointing
from distill.training.model import DistillModel
from distill.training.optim import OPTIMIZERS, make_optimizer

HERE = torch.device("cpu")
EIGHT_BITS = ("int8", "fp8")
"""Values of `teacher.dtype` in which the weights of linear maps take a byte."""
EIGHT_BIT_BLOCK, EIGHT_BIT_FROM = 256, 4096
"""Weights that share one scale of an 8-bit moment, and the fewest of a parameter that has such; as in bitsandbytes."""


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
    teacher_dtype: str = "stored"
    """As the recipe says it."""
    teacher_device: str = "same"
    """As the recipe says it."""
    cached: TeacherCache | None = None
    """What is there of the teacher is what a cache keeps, and its head where logits are made by that."""
    beside: Sequence[Callable[[], Any]] = ()
    """Makes the other teachers on the device, which are run one after the other."""

    def objective(self, terms: Sequence[Term], chunk: int | None = None) -> Objective:
        """Make an objective of some of the terms."""
        precision = None if self.spec.head_precision == "auto" else self.spec.head_precision
        return Objective(terms, self.kind, self.maps, self.vocabulary, chunk, self.encoder_maps, precision)

    @property
    def narrow(self) -> bool:
        """True where micro-batches may have fewer examples without another result."""
        return not PREDICTION_KINDS[self.kind].vectors

    def with_spec(self, **changes: Any) -> Rehearsal:
        """Return the training with other values in its section."""
        return replace(self, spec=self.spec.model_copy(update=changes))

    def with_rows(self, rows: int) -> Rehearsal:
        """Return the training with fewer examples in each pass, the longest ones."""
        passes = self.passes * -(-row_count(self.batch) // rows)
        batch = {name: tensor[:rows] for name, tensor in self.batch.items()}
        return replace(self.with_spec(micro_batch_size=rows), batch=batch, passes=passes)

    def hollow(self) -> tuple[Any, Any]:
        """Make the model that is trained, and the teacher or None, without weights."""
        return make_hollow(self.build), None if self.teacher is None else make_hollow(self.teacher)

    def freeze(self, student: Any) -> None:
        """Set the dtype of the weights, and freeze parameters or add adapters, as the training does."""
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

    def prepare(self, student: Any, teacher: Any, terms: Sequence[Term]) -> DistillModel:
        """Freeze, wrap and set up the models as the training does."""
        self.freeze(student)
        objective = self.objective(terms)
        if teacher is not None:
            objective.project(student.config.hidden_size, teacher.config.hidden_size)
        for each in (student, teacher) if objective.student.attention else ():
            use_eager_attention(each)
        if self.spec.gradient_checkpointing:
            gradient_checkpointing(student, "enable")({"use_reentrant": False})
        return DistillModel(student, objective).train()

    def average(self, wrapper: DistillModel) -> Ema | None:
        """Build the EMA of the trainable weights, in fp32; None where the training has none."""
        return None if self.spec.ema is None else Ema(wrapper, self.spec.ema, lambda weight: weight.detach().float())


def make_hollow(make: Callable[[], Any]) -> Any:
    """Make a model without weights."""
    with torch.device("meta"), no_init_weights():
        return make()


def autocast(spec: Optimization, device: torch.device) -> torch.autocast:
    """Return the autocast context of a training, as Accelerate sets it up."""
    return torch.autocast(device.type, DTYPES[spec.precision], enabled=spec.precision != "fp32")


def rehearse_memory(training: Rehearsal, device: torch.device) -> Peak:
    """Trace the peak memory of one step on one device, by part; nothing is computed.

    Parts: `weights`, `gradients`, `optimizer`, `average`, `teacher`, `activations` (with what passes take for a while),
    `loss` (logits and gradients of a vocabulary head).

    Args:
        training: The training, on one process.
        device: Decides how many positions the loss has at once; it need not be there.
    """
    student, teacher = training.hollow()
    others = [make_hollow(make) for make in training.beside]
    heads = [output_head(model) for model in (student, teacher) if model is not None]
    apart = heads[0] is not None and PREDICTION_KINDS[training.kind].vocabulary
    # The loss of a vocabulary is looked at apart: nothing of it is left in the step but the gradient of the head.
    left = [term for term in training.terms if not (apart and MATCHES[term.match].on_logits)]
    with torch.device("meta"):
        wrapper = training.prepare(student, teacher, left or [Term(match="labels")])
    elsewhere = training.cached is not None or (training.teacher_device == "cpu" and device.type != "cpu")
    with tracing() as trace:
        trace.fill("weights")
        make_fake(wrapper)
        if teacher is not None:
            trace.fill("elsewhere" if elsewhere else "teacher")
            make_fake(teacher)
            if training.cached and training.cached.keep == "hidden" and (kept := output_head(teacher)):
                trace.move([kept.weight], "teacher")
        trace.fill("teacher")
        for each in others:
            make_fake(each)
        before = _trace_step(training, wrapper, teacher, bool(left), trace)
        peaks = list(trace.peaks.values())
    if apart:
        peaks.append(Peak({**before, "loss": _loss_bytes(training, heads, device)}, "the loss"))
    if training.teacher_dtype in EIGHT_BITS and teacher is not None and not elsewhere:
        saved = _saved_by_eight_bits(teacher, training.teacher_dtype)
        peaks = [replace(peak, parts={**peak.parts, "teacher": peak.parts["teacher"] - saved}) for peak in peaks]
    on_device = [
        replace(peak, parts={name: size for name, size in peak.parts.items() if size and name != "elsewhere"})
        for peak in peaks
    ]
    return max(on_device, key=lambda peak: peak.total)


def _saved_by_eight_bits(model: Any, dtype: str) -> int:
    """Count the bytes that 8 bits save: weights of linear maps have one each, and their rows a scale.

    bitsandbytes (int8) converts all linear maps but the head, we (fp8) those of layers with sizes that GPUs multiply.
    """
    head, parts = model.get_output_embeddings(), [model] if dtype == "int8" else all_layers(model)
    maps = [module for part in parts for module in part.modules() if isinstance(module, nn.Linear)]
    if dtype == "fp8":
        maps = [own for own in maps if all(size % MULTIPLE == 0 for size in own.weight.shape)]
    own_bytes = [own.weight.nbytes - own.weight.numel() - 4 * own.out_features for own in maps if own is not head]
    return sum(own_bytes)


def _trace_step(
    training: Rehearsal, wrapper: DistillModel, teacher: Any | None, scored: bool, trace: MemoryTrace
) -> dict[str, int]:
    """Run one step on fake tensors; returns the bytes of each part before the loss.

    Args:
        training: The training.
        wrapper: Fake student, with the objective of this step.
        teacher: Fake.
        scored: The objective has terms of its own; else no position has a label.
        trace: Counts.
    """
    whole, objective = training.objective(training.terms), wrapper.objective
    trace.fill("activations")
    batch = training.batch
    labelled = batch if scored else {**batch, "labels": batch["labels"] * 0 + UNLABELLED}
    state, average = _fill_state(training, wrapper, trace)
    trace.peaks.clear()
    trace.fill("elsewhere" if training.cached else "activations", "the teacher's pass")
    given = LiveTeacher(teacher, whole.teacher, HERE)(batch) if teacher is not None else None
    trace.fill("activations", "the forward pass")
    if training.cached and given is not None:
        given = as_kept(given, training.cached)
    with autocast(training.spec, HERE):
        own = forward(wrapper.student, batch, whole.student)
        before = dict(trace.bytes)
        trace.fill("activations", "the loss")
        loss = objective(own, given, labelled, objective.counts([labelled]))[0]
    del own, given
    trace.fill("activations", "the backward pass")
    loss.backward()  # type: ignore[no-untyped-call]
    del loss
    trace.fill("activations", "the optimizer's step")
    nn.utils.clip_grad_norm_(wrapper.parameters(), training.spec.max_grad_norm or float("inf"))
    if average is not None:
        average.update(1, torch.zeros(()))
    del state
    return before


def _fill_state(training: Rehearsal, wrapper: DistillModel, trace: MemoryTrace) -> tuple[list[Tensor], Ema | None]:
    """Bring a training to its second step, or within one that accumulates: state, average and gradients are there."""
    learning = [parameter for parameter in wrapper.parameters() if parameter.requires_grad]

    def is_gradient(parameter: Any) -> None:
        trace.move([parameter.grad], "gradients")

    for parameter in learning:
        parameter.register_post_accumulate_grad_hook(is_gradient)  # type: ignore[no-untyped-call]
    trace.fill("optimizer")
    state = [torch.empty(state_bytes(training.spec, each), dtype=torch.uint8) for each in learning]
    if training.spec.optimizer not in OPTIMIZERS:
        state = _state_of_own(training, wrapper, learning)
    trace.fill("average")
    average = training.average(wrapper)
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


def _loss_bytes(training: Rehearsal, heads: Sequence[OutputHead | None], device: torch.device) -> int:
    """Count the bytes of the loss of a vocabulary, even in its positions and in those that are there at once."""
    indices = [index for index, term in enumerate(training.terms) if MATCHES[term.match].on_logits]
    if not indices:
        return 0
    terms, known = [training.terms[index] for index in indices], [head for head in heads if head is not None]
    positions = int(training.objective(training.terms).counts([training.batch])[indices].max())
    vocabulary = max(len(head.weight) for head in known)
    chunk = min(positions, chunk_size(vocabulary, device))
    few = max(1, min(BLOCK["cpu"] // vocabulary, chunk // 2))
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
    batch = {"labels": ids, "attention_mask": ids + 1}
    with tracing() as trace:
        for number, head in enumerate(heads):
            weight = torch.empty(head.weight.shape, dtype=head.weight.dtype, requires_grad=head.weight.requires_grad)
            bias = None if head.bias is None else torch.empty(head.bias.shape, dtype=head.bias.dtype)
            last = torch.empty(1, positions + 1, weight.shape[1], dtype=weight.dtype, requires_grad=number == 0)
            sides.append(Outputs(None, last=last, head=replace(head, weight=weight, bias=bias)))
        if training.cached and sides[1:]:
            sides[1] = as_kept(sides[1], training.cached)
        counts, at_rest = objective.counts([batch]), trace.bytes.total()
        trace.fill("loss", "the loss")
        objective(sides[0], sides[1] if sides[1:] else None, batch, counts)
        return trace.peaks["the loss"].total - at_rest

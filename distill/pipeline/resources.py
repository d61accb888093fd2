"""Memory per device and speed of every training of a recipe, and what a cache of its teacher takes; for `plan`.

Two doors: `forecast` for a run whose data and plan are there, on the device of this process, with speeds;
`forecast_for` for a card that need not be there, from the recipe, the teacher's config and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import DistributedType

from distill.models.family import all_layers
from distill.models.forward import row_count
from distill.models.memory import Peak, free_bytes
from distill.models.plan import StudentPlan
from distill.pipeline.cache import sizes_of, wanted_columns
from distill.pipeline.cached_inputs import find_entries, inputs_of_training
from distill.pipeline.rehearsal import EIGHT_BITS, Rehearsal, rehearse_memory
from distill.pipeline.session import Session
from distill.pipeline.timing import StepTime, advise_depth, rehearse_time
from distill.pipeline.trainings import Models, Work, hollow_works, works_of
from distill.ranks import process_state
from distill.recipe.cache import LAYERS, PREDICTIONS, TeacherCache
from distill.recipe.sections import Lora
from distill.release.table import Printed, Table
from distill.release.wording import MISSING, format_count, format_seconds, format_size
from distill.training.learner import SHARDING

COLUMNS = {
    "weights": "weights", "gradients": "gradients", "optimizer": "optimizer", "average": "average",
    "teacher": "teacher", "activations": "activations", "loss": "loss head", "copy": "copy of a checkpoint",
}  # fmt: skip
"""Part of the memory -> words."""
LOOKED_AT = 4096
"""Inputs of the training that are counted, at most: of more, every second, third, …"""
NOTE = "The parts are what each takes at the peak of a step."
Peaks = Sequence[Peak | str]
Times = Sequence[StepTime | str | None]


def forecast(session: Session) -> Iterator[Printed]:
    """Tabulate memory and speed of all trainings of a run whose plan is made, then what would make them fit."""
    device = process_state().device
    free, works = free_bytes(device), works_of(session)
    peaks = [peak_of(work.rehearsal, device) for work in works]
    times = [time_of(work, device) for work in works]
    title = f"memory per device and speed on {device.type}, {format_size(free)} free"
    yield _tabulate(works, peaks, times, title, free)
    if session.recipe.teacher.cache is not None:
        work = next(work for work in works if work.rehearsal.title == "distilled")
        live = time_of(replace(work, rehearsal=replace(work.rehearsal, cached=None)), device)
        yield tabulate_cache(session, work, live if isinstance(live, StepTime) else None)
    yield from advise_all(works, peaks, device, free)


def tabulate_cache(session: Session, work: Work, live: StepTime | None) -> Printed:
    """Tabulate size and time of a cache.

    Args:
        session: A run whose plan is made.
        work: The training that will read it.
        live: The time of its steps with the teacher; None where it is not known.

    Returns:
        Title, table, and when it pays.
    """
    columns, pairs = wanted_columns(session), inputs_of_training(session).pairs
    every = -(-len(pairs) // LOOKED_AT)
    looked = find_entries(session, columns, every)
    tokens = looked.tokens * every
    sizes = sizes_of(session, columns, {name: every * count for name, count in looked.positions.items()})
    per_token, steps = sum(sizes[column.name] for column in columns) / tokens, work.steps or 0
    times_read = steps * work.tokens / tokens
    once = None if live is None else live.teacher * tokens / work.tokens
    saved = None if once is None or live is None else steps * live.teacher - once
    rows = [
        ("inputs, tokens", f"{format_count(len(looked.examples) * every)}, {format_count(tokens)}"),
        *((name, format_size(size)) for name, size in sizes.items()),
        ("on disk", format_size(sum(sizes.values()))),
        ("bytes per token", f"{per_token:,.0f}"),
        ("the teacher's pass", MISSING if once is None else format_seconds(once)),
        ("the training reads each input", f"{times_read:.1f} times"),
        ("the teacher's time in it, live", MISSING if live is None else format_seconds(steps * live.teacher)),
    ]
    if times_read > 1:
        note = "It pays for this training" + (f": {format_seconds(saved)} saved." if saved and saved > 0 else ".")
    else:
        note = "It does not pay for this training alone, which reads each input once."
    more = (
        "It pays from the second epoch on, for every further student of the same teacher and data, which finds it, and "
    )
    note = f"{note} {more}where the teacher does not fit."
    return Printed("the cached teacher, about", Table(("", "cache"), rows), note)


def depth_before_width(session: Session) -> str | None:
    """Say in a line what depth would bring in the place of narrower layers; None where it brings nothing."""
    plan = StudentPlan.load(session.folder.plan)
    if plan.given is not None or all(
        layer.width == layer.teacher_width for side in ("main", "encoder") for layer in plan.stack(side)
    ):
        return None
    models = Models(session, session.teacher, session.head, session.corpus.head, plan)
    length = None if session.kind.causal else session.recipe.data.max_length
    return advise_depth(models.student(), models.whole(), length, process_state().device)


def forecast_for(session: Session, size: int) -> Iterator[Printed]:
    """Tabulate the memory of all trainings on a card of so many bytes, from configs alone."""
    device, works = torch.device("cuda"), hollow_works(session)
    peaks = [peak_of(work.rehearsal, device) for work in works]
    title = f"memory per device, for a card with {format_size(size)}"
    yield _tabulate(works, peaks, [None] * len(works), title, size)
    yield from advise_all(works, peaks, device, size)


def peak_of(rehearsal: Rehearsal, device: torch.device) -> Peak | str:
    """Find the peak of a training on one device of this launch; or why it cannot be told."""
    state = process_state()
    if state.distributed_type == DistributedType.DEEPSPEED:
        return "not predicted under DeepSpeed"
    try:
        peak = rehearse_memory(rehearsal, device)
    except (RuntimeError, AssertionError) as error:
        # Whatever fake tensors cannot do is one of these two.
        return f"not predicted: the model does not run on fake tensors ({str(error).splitlines()[0][:80]})"
    shared = share_out(peak, rehearsal, state.num_processes, state.distributed_type in SHARDING)
    return with_copy(shared, rehearsal) if device.type == "cpu" else shared


def with_copy(peak: Peak, rehearsal: Rehearsal) -> Peak:
    """Add the copy that a checkpoint is written from; it lies in main memory, which a GPU's table leaves out."""
    parts = peak.parts
    adapted = rehearsal.spec.lora is not None  # then a checkpoint holds what learns
    weights = _trainable_bytes(rehearsal, rehearsal.hollow()[0]) if adapted else parts.get("weights", 0)
    return replace(peak, parts={**parts, "copy": weights + parts.get("optimizer", 0) + parts.get("average", 0)})


def share_out(peak: Peak, rehearsal: Rehearsal, world: int, sharding: bool) -> Peak:
    """Convert the peak of one process to that of each of several.

    DDP keeps the gradients a second time, in its buckets. FSDP2 keeps a share of weights, gradients and state, and
    while a layer runs its weights and gradients whole, and the weights of the next one.
    """
    parts = dict(peak.parts)
    if world == 1:
        return peak
    student, teacher = rehearsal.hollow()
    if not sharding:
        parts["gradients"] = parts.get("gradients", 0) + _trainable_bytes(rehearsal, student)
    else:
        parts |= {name: parts.get(name, 0) // world for name in ("weights", "gradients", "optimizer", "average")}
        parts["weights"] += 2 * _largest_layer(student)
        parts["gradients"] += _largest_layer(student)
    if teacher is not None and rehearsal.teacher_device == "sharded":
        parts["teacher"] = parts["teacher"] // world + 2 * _largest_layer(teacher)
    return replace(peak, parts=parts)


def _trainable_bytes(rehearsal: Rehearsal, student: Any) -> int:
    with torch.device("meta"):
        rehearsal.freeze(student)
    return sum(parameter.nbytes for parameter in student.parameters() if parameter.requires_grad)


def _largest_layer(model: Any) -> int:
    return max(sum(parameter.nbytes for parameter in layer.parameters()) for layer in all_layers(model))


def time_of(work: Work, device: torch.device) -> StepTime | str:
    """Time a training on the device; or why it cannot be told."""
    own = work.rehearsal
    if own.cached is None and (own.teacher_dtype in EIGHT_BITS or own.teacher_device != "same"):
        return "a teacher in 8 bits, on the CPU or sharded is not timed"
    if own.beside:
        return "several teachers are not timed"
    try:
        time = rehearse_time(replace(own, batch=work.usual or own.batch), device)
    except torch.OutOfMemoryError:
        return "out of memory with three layers"
    return time.scaled(work.share)


def _tabulate(works: Sequence[Work], peaks: Peaks, times: Times, title: str, size: int) -> Printed:
    """Tabulate a column for each training."""
    names, notes = [work.rehearsal.title for work in works], []
    known = [peak if isinstance(peak, Peak) else None for peak in peaks]
    used = [part for part in COLUMNS if any(peak and peak.parts.get(part) for peak in known)]
    rows = [
        (COLUMNS[part], *(format_size(peak.parts.get(part)) if peak else MISSING for peak in known)) for part in used
    ]
    rows.append(("peak", *(format_size(peak.total) if peak else MISSING for peak in known)))
    rows.append(("which is in", *(peak.moment if peak else MISSING for peak in known)))
    rows.append(("fits", *(("yes" if peak.total <= size else "no") if peak else MISSING for peak in known)))
    if any(time is not None for time in times):
        speeds = [_speed(work, time) for work, time in zip(works, times, strict=True)]
        rows.append(("tokens/s", *(speed for speed, _ in speeds)))
        rows.append(("time of its steps", *(whole for _, whole in speeds)))
    if any(getattr(work.rehearsal.spec, "on_policy", None) for work in works):
        notes.append("All answers are taken for those of the data: what the student writes is not counted (on_policy).")
    for name, peak, time in zip(names, peaks, times, strict=True):
        notes += [f"{name}: {reason}." for reason in (peak, time) if isinstance(reason, str)]
    return Printed(title, Table(("", *names), rows), " ".join([NOTE, *notes]))


def _speed(work: Work, time: StepTime | str | None) -> tuple[str, str]:
    """Write tokens per second, and the time of all steps."""
    if not isinstance(time, StepTime):
        return MISSING, MISSING
    whole = MISSING if work.steps is None else format_seconds(work.steps * time.seconds)
    return format_count(work.tokens / time.seconds), whole


def advise_all(works: Sequence[Work], peaks: Peaks, device: torch.device, size: int) -> Iterator[Printed]:
    """Tabulate for each training that does not fit what would make it fit, each change on top of those before."""
    for work, peak in zip(works, peaks, strict=True):
        if isinstance(peak, str) or peak.total <= size:
            continue
        rows, fits = [], False
        for label, changed in changes(work.rehearsal, device, size):
            new = peak_of(changed, device)
            total = new.total if isinstance(new, Peak) else None
            fits = total is not None and total <= size
            rows.append((label, format_size(total), "yes" if fits else "no"))
            if fits:
                break
        name = work.rehearsal.title
        title = f"{name} needs {format_size(peak.total)} of {format_size(size)}: what would make it fit"
        note = "Each line includes those above it."
        yield Printed(title, Table(("change", "peak", "fits"), rows), note if fits else f"{note} {name} does not fit.")


def changes(rehearsal: Rehearsal, device: torch.device, size: int) -> Iterator[tuple[str, Rehearsal]]:
    """Yield what takes memory off a training, the cheapest first, each on top of those before."""
    key, own = "teacher.fit" if rehearsal.title == "teacher.fit" else "training", rehearsal
    sharding, built_in = process_state().distributed_type in SHARDING, ":" not in own.spec.optimizer
    if own.narrow and row_count(own.batch) > 1:
        own = _narrower(own, device, size)
        yield f"{key}.micro_batch_size: {own.spec.micro_batch_size}", own
    if not own.spec.gradient_checkpointing:
        own = own.with_spec(gradient_checkpointing=True)
        yield f"{key}.gradient_checkpointing: true", own
    if own.spec.weights == "fp32" and built_in and not sharding:
        own = own.with_spec(weights="bf16", precision="bf16")
        yield f"{key}.weights: bf16, {key}.precision: bf16", own
    if own.spec.optimizer == "adamw" and not sharding:
        own = own.with_spec(optimizer="adamw_8bit")
        yield f"{key}.optimizer: adamw_8bit", own
    if own.spec.lora is None and own.teacher is not None:
        own = own.with_spec(lora=Lora(), freeze=[], only=["*"])
        yield f"{key}.lora: {{rank: {Lora().rank}}}", own
    yield from _smaller_teachers(own, device)


def _narrower(own: Rehearsal, device: torch.device, size: int) -> Rehearsal:
    """Halve the micro-batches until the training fits, or they are single examples."""
    rows = row_count(own.batch)
    while rows > 1:
        rows = next(count for count in range(rows // 2, 0, -1) if own.spec.batch_size % count == 0)
        narrow = own.with_rows(rows)
        peak = peak_of(narrow, device)
        if isinstance(peak, Peak) and peak.total <= size:
            break
    return narrow


def _smaller_teachers(own: Rehearsal, device: torch.device) -> Iterator[tuple[str, Rehearsal]]:
    """Yield a teacher in bf16, in 8 bits, and on disk or in main memory."""
    if own.teacher is None or own.teacher_device != "same" or own.cached is not None:
        return
    if own.teacher_dtype not in ("bf16", "fp16", *EIGHT_BITS) and own.hollow()[1].dtype == torch.float32:
        make = own.teacher
        own = replace(own, teacher=lambda: make().to(torch.bfloat16), teacher_dtype="bf16")
        yield "teacher.dtype: bf16", own
    if own.teacher_dtype not in EIGHT_BITS and device.type == "cuda":
        own = replace(own, teacher_dtype="int8")
        yield "teacher.dtype: int8", own
    if all(term.match in (*PREDICTIONS, *LAYERS, "labels") for term in own.terms):
        yield "teacher.cache: {keep: hidden}", replace(own, cached=TeacherCache())
    elif device.type == "cuda":
        yield "teacher.device: cpu", replace(own, teacher_device="cpu")

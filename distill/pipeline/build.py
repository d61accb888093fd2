"""Stage `build`: cut the student, and prove that what is cut is all that changes."""

from __future__ import annotations

from typing import Any

import torch

from distill.errors import InputError
from distill.files import content_of
from distill.models.family import layers_of, layout_of
from distill.models.forward import MODEL_INPUTS, Batch, logits_of, with_decoder_inputs
from distill.models.layout import StackName
from distill.models.load import folder_fingerprint
from distill.models.pattern import pattern_note
from distill.models.plan import StudentPlan
from distill.pipeline.given_student import build_given, given_inputs
from distill.pipeline.release_forms import try_forms
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage
from distill.pipeline.train import save_model
from distill.ranks import free_memory
from distill.release.formats import format_of
from distill.student import build_student
from distill.student.calibration.removal import skip_layers
from distill.student.draw import exact_plan

PROBES, PROBE_LENGTH = 4, 64
"""Training examples on which the student that keeps everything is compared with the teacher, and tokens of each; the
logits of a few long texts over a large vocabulary would take gigabytes."""
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Largest gap of logits, as a share of the largest logit, that another order of sums explains."""
HALF_ROUNDING = 0.03
"""The same for half precision."""


def work(session: Session) -> None:
    """Build the student that the plan describes, once a student that keeps everything is the teacher."""
    if session.recipe.student.given is not None:
        build_given(session)
        return
    teacher, plan = session.load(session.teacher), StudentPlan.load(session.folder.plan)
    size, free = sum(tensor.nbytes for tensor in teacher.state_dict().values()), free_memory()
    if size < free:
        batch = with_decoder_inputs(teacher, session.first_examples(PROBES))
        # Heads of classes give few logits, and that of BART looks for the end of each text.
        short = PROBE_LENGTH if session.kind.vocabulary else None
        probe = {
            name: each[:, :short] if each.ndim == 2 else each for name, each in batch.items() if name in MODEL_INPUTS
        }
        check_keeps_all(teacher, probe)
        check_kept_layers(teacher, plan, probe)
    else:
        session.say(
            f"  not checked that keeping everything gives the teacher's logits: a second copy of the teacher "
            f"({size / 1e9:.1f} GB) does not fit into the free memory ({free / 1e9:.1f} GB)"
        )
    student = build_student(teacher, plan)
    if note := pattern_note(student.config):
        session.say(f"  {note}")
    format_of(student, session.recipe.release.format)  # refused before it is trained
    try_forms(session, student)
    save_model(session, student, session.folder.student)


def check_keeps_all(teacher: Any, batch: Batch) -> None:
    """Refuse a teacher whose logits a student that keeps every layer and neuron does not give.

    Then something decides about its output that the knife does not know, and every student would lack it.

    Args:
        teacher: On the CPU, in its stored dtype.
        batch: A few real examples.

    Raises:
        InputError: With the largest gap.
    """
    every = {side: list(range(len(layers_of(teacher, side)))) for side in layout_of(teacher).sides}
    _compare(teacher, every, batch, "keeps every layer and neuron", "teacher's")


def check_kept_layers(teacher: Any, plan: StudentPlan, batch: Batch) -> None:
    """Refuse to drop layers where those that stay, with all neurons, do not compute what they did in the teacher.

    Then something depends on a layer's index that the knife does not renumber.

    Args:
        teacher: On the CPU, in its stored dtype.
        plan: Says which layers stay.
        batch: A few real examples.

    Raises:
        InputError: With the largest gap.
    """
    sides = layout_of(teacher).sides
    kept = {side: [layer.teacher_layer for layer in plan.stack(side)] for side in sides}
    if any(len(kept[side]) < len(layers_of(teacher, side)) for side in sides):
        _compare(teacher, kept, batch, "has only these layers", "teacher's without the others")


@torch.no_grad()
def _compare(teacher: Any, kept: dict[StackName, list[int]], batch: Batch, student: str, whose: str) -> None:
    """Refuse a gap, which rounding does not explain, between teacher and student with the same whole layers."""
    stacks = {side: layers_of(teacher, side) for side in kept}
    gone = [layer for side, layers in stacks.items() for index, layer in enumerate(layers) if index not in kept[side]]
    with skip_layers(gone):
        given = logits_of(teacher, batch)
    own = logits_of(build_student(teacher, exact_plan(teacher, kept)), batch)
    if torch.equal(given, own):
        return
    gap, largest = (given - own).abs().max().item(), given.abs().max().item()
    if not gap <= ROUNDING.get(teacher.dtype, HALF_ROUNDING) * largest:
        raise InputError(
            f"a student that {student} of this {teacher.config.model_type} does not give the {whose} logits on the "
            f"data: they differ by up to {gap:.3g}, where the largest is {largest:.3g}; models of this kind cannot be "
            f"cut like this"
        )


def inputs(session: Session) -> dict[str, Any]:
    """List teacher and plan, or a given student, and the forms in which it is tried before it is trained."""
    own = {
        "teacher": folder_fingerprint(session.teacher),
        "plan": content_of(session.folder.plan),
        "tried": session.recipe.release.model_dump(mode="json", include={"format", "also"}),
    }
    return own if session.recipe.student.given is None else {**own, **given_inputs(session)}


STAGE = Stage("build", work, inputs, lambda session: [session.folder.student])

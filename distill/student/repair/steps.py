"""Corrections of a cut student in closed form, before it is trained: bias, refit, merge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from distill.errors import InputError
from distill.models.family import layout_of
from distill.models.forward import Batch
from distill.models.mlp import mlps_of
from distill.models.plan import StudentPlan
from distill.recipe.schema import Repair
from distill.student.repair.merge import merge_blocks
from distill.student.repair.moments import LARGEST, LayerError
from distill.student.repair.refit import FITS, fit_outputs, layer_errors, write_output


@dataclass(frozen=True)
class RepairStep:
    """One finished step of a repair."""

    name: str
    """`bias`, `refit` or `merge`."""
    layers: list[LayerError]
    notes: list[str] = field(default_factory=list)
    """Layers that could not be repaired, with the reason."""

    @property
    def left(self) -> float | None:
        """Squared error after the step as a share of that before it; None where there was none."""
        before = sum(layer.mse_before for layer in self.layers)
        return sum(layer.mse_after for layer in self.layers) / before if before else None


def check_repair(model: Any, spec: Repair) -> None:
    """Refuse steps that a family cannot have; the model may be on the meta device.

    Raises:
        InputError: An encoder-decoder, `bias` without an output bias, or `merge` where a norm follows the MLP.
    """
    layout, family = layout_of(model), model.config.model_type
    if layout.encoder is not None:
        raise InputError(
            f"student.repair: {family} is an encoder-decoder, whose layers cannot be repaired yet; remove it"
        )
    if spec.bias and all(mlp.bias_out is None for mlp in mlps_of(model)):
        raise InputError(
            f"student.repair.bias: the MLPs of {family} have no output bias that could take up what the "
            "removed neurons gave; use `refit: true`, which needs none"
        )
    pre_norm = layout.main.pre_norm_key and getattr(model.config, layout.main.pre_norm_key)
    if spec.merge and layout.main.normed_after and not pre_norm:
        raise InputError(
            f"student.repair.merge: in {family} {layout.main.normed_after}, so no linear map of that output stands for "
            "further layers; remove it (`refit` works for every family)"
        )


@torch.no_grad()
def repair_student(
    teacher: Any, student: Any, plan: StudentPlan, batches: Sequence[Batch], spec: Repair, most: int = LARGEST
) -> Iterator[RepairStep]:
    """Correct the student in place, step by step: bias, refit, merge. Each is done when it is yielded.

    Args:
        teacher: Gives the activations; not changed.
        student: As cut by `build_student`, on the teacher's device.
        plan: The plan that it was cut by.
        batches: The calibration sample; gone through once for each group of layers.
        spec: The steps and the strength of their ridge.
        most: Bytes of moments to hold at a time; a single layer or expert may take more.

    Raises:
        InputError: The family cannot have a step that is asked for.
    """
    check_repair(teacher, spec)
    asked = [name for name in FITS if getattr(spec, name)]
    fitted = fit_outputs(teacher, student, plan, batches, spec.ridge, asked, most) if asked else {}
    for name, fits in fitted.items():
        for fit in fits:
            write_output(fit)
        yield RepairStep(name, layer_errors(plan, fits), [] if fits else ["no neuron was removed"])
    if spec.merge:
        layers, notes = merge_blocks(teacher, student, plan, batches, spec.ridge, most)
        yield RepairStep("merge", layers, notes)

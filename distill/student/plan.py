"""Decide what the student keeps. Pure: reads the teacher's weights and the statistics, touches nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.errors import InputError
from distill.models.layout import Side, check_kept, layout_of
from distill.models.mlp import mlps_of
from distill.models.plan import Choice, LayerPlan, StudentPlan
from distill.recipe.schema import Student
from distill.registry import bind, find
from distill.student.allocate import ALLOCATIONS
from distill.student.calibrate import Statistics
from distill.student.importance import SCORES, MlpLayer
from distill.student.layers import CHOICES


def plan_student(model: Any, spec: Student, calibration: Statistics | None = None) -> StudentPlan:
    """The plan for a student of `model`.

    Args:
        model: The teacher, a transformers model of a known family.
        spec: The recipe's `student` section.
        calibration: Statistics of one calibration pass; needed by the policies that read activations.

    Raises:
        InputError: An unknown family, a layer out of range, a width that cannot be had, or a missing calibration.
    """
    stacks = {side: _plan_stack(model, side, spec, calibration) for side in layout_of(model).sides}
    depths = {side: len(mlps_of(model, side)) for side in stacks}
    return StudentPlan(
        model_type=model.config.model_type,
        teacher_layers=depths["main"],
        layers=stacks["main"],
        teacher_encoder_layers=depths.get("encoder"),
        encoder_layers=stacks.get("encoder"),
        layer_policy=spec.layers.choose if isinstance(spec.layers.keep, int) else "explicit",
        mlp_score=spec.mlp.score,
        mlp_allocation=spec.mlp.allocate,
        choices=_choices(spec, stacks["main"]),
        layer_scores={} if calibration is None else {"block_influence": calibration.block_influence().tolist()},
    )


def _plan_stack(model: Any, side: Side, spec: Student, calibration: Statistics | None) -> list[LayerPlan]:
    mlps = mlps_of(model, side)
    kept = choose_layers(len(mlps), spec, calibration) if side == "main" else list(range(len(mlps)))
    check_kept(model, side, kept)
    score = bind(find(SCORES, spec.mlp.score, "score"), spec.mlp.params, "student.mlp.params")
    allocate = find(ALLOCATIONS, spec.mlp.allocate, "allocation")
    scores: list[Tensor] = []
    for index in kept:
        mlp = mlps[index]
        weights_in = [weight.detach() for weight in mlp.weights_in]
        values = score(MlpLayer(index, weights_in, mlp.weight_out.detach()), calibration)
        expected = (*mlp.weight_out.shape[:-2], mlp.width)
        if values.shape != expected or not torch.isfinite(values).all():
            raise InputError(
                f"student.mlp.score: {spec.mlp.score} must return finite values of shape {expected} for layer {index}, "
                f"it returned shape {tuple(values.shape)}"
            )
        scores.append(values)
    widths = allocate(scores, spec.mlp.keep, spec.mlp.multiple_of)
    if len(widths) != len(scores) or not all(
        0 < width <= own.shape[-1] for width, own in zip(widths, scores, strict=False)
    ):
        raise InputError(f"student.mlp.allocate: {spec.mlp.allocate} returned {widths} for {len(scores)} layers")
    return [
        LayerPlan(teacher_layer=index, width=width, teacher_width=values.shape[-1], neurons=top_neurons(values, width))
        for index, width, values in zip(kept, widths, scores, strict=True)
    ]


def choose_layers(layers: int, spec: Student, calibration: Statistics | None) -> list[int]:
    """Ascending indices of the kept layers. Raises InputError when the request does not fit `layers`."""
    keep = spec.layers.keep
    if isinstance(keep, list):
        if not keep or sorted(set(keep)) != keep:
            raise InputError(f"student.layers.keep: {keep} must name layers once each, in ascending order")
        if keep[-1] >= layers:
            raise InputError(f"student.layers.keep: layer {keep[-1]} does not exist; the teacher has 0 to {layers - 1}")
        return keep
    if keep > layers:
        raise InputError(f"student.layers.keep: {keep} layers asked, the teacher has {layers}")
    policy = bind(find(CHOICES, spec.layers.choose, "layer policy"), spec.layers.params, "student.layers.params")
    chosen: list[int] = policy(layers, keep, calibration)
    if sorted(set(chosen)) != chosen or len(chosen) != keep or chosen[-1] >= layers or chosen[0] < 0:
        raise InputError(
            f"student.layers.choose: {spec.layers.choose} returned {chosen}, not {keep} ascending layers of {layers}"
        )
    return chosen


def top_neurons(scores: Tensor, width: int) -> list[Any] | None:
    """Ascending indices of the `width` highest scores, ties to the lower index; None when all are kept.

    For experts, scores are [E, F] and each expert has its own list.
    """
    if width == scores.shape[-1]:
        return None
    # A stable sort of the negated scores breaks ties by index, which topk does not promise.
    order = (-scores.double()).argsort(dim=-1, stable=True)
    return order[..., :width].sort(dim=-1).values.tolist()


def _choices(spec: Student, layers: list[LayerPlan]) -> dict[str, Choice]:
    share, full = spec.mlp.keep, layers[0].teacher_width
    kept, widths = [layer.teacher_layer for layer in layers], [layer.width for layer in layers]
    asked = f"{share:g} of {full}" if isinstance(share, float) else f"{share} of {full}"
    wanted = int(share * full + 1e-9) if isinstance(share, float) else share
    got = ", ".join(str(width) for width in sorted(set(widths)))
    reason = f"rounded down to a multiple of {spec.mlp.multiple_of}" if min(widths) < wanted else ""
    return {
        "student.layers.keep": Choice(asked=str(spec.layers.keep), got=", ".join(map(str, kept))),
        "student.mlp.keep": Choice(asked=asked, got=f"{got} of {full}", reason=reason),
    }

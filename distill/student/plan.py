"""Decide which layers and neurons the student keeps, from the teacher's weights and the statistics; changes neither."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distill.errors import InputError
from distill.models.cost import latency_ratio
from distill.models.family import depths_of
from distill.models.layout import StackName
from distill.models.mlp import NeuronAxis, placed_mlps
from distill.models.plan import KeptUnits, LayerPlan, Outcome, StudentPlan
from distill.recipe.locate import TeacherSize
from distill.recipe.names import READS
from distill.recipe.rules import check_together
from distill.recipe.schema import Layers, Student
from distill.registry import bind, find
from distill.student import layers
from distill.student.allocate import ALLOCATIONS, EXACT, layer_widths
from distill.student.build import build_student
from distill.student.calibration.collect import StatisticsRequest
from distill.student.calibration.statistics import Statistics
from distill.student.layers import LAYER_POLICIES, choose_layers, policy_of
from distill.student.masks.masks import MASK_SCORES
from distill.student.scores import SCORES, MlpLayer
from distill.student.targets import check_target, costs_of, shares, solve


@dataclass(frozen=True)
class _Scored:
    """One kept layer and the scores of its neurons."""

    side: StackName
    index: int
    values: Tensor
    """[F]; [E, F] for experts."""

    @property
    def width(self) -> int:
        """F."""
        return self.values.shape[-1]

    @property
    def ranked(self) -> Tensor:
        """[F] for an allocation: of experts, the mean over experts of each one's sorted scores."""
        values = self.values.double().cpu()
        return values if values.ndim == 1 else values.sort(dim=-1, descending=True).values.mean(dim=0)

    def cut(self, width: int) -> LayerPlan:
        """Plan the layer with its best neurons."""
        kept = KeptUnits(of=self.width, units=top_units(self.values, width))
        return LayerPlan(teacher_layer=self.index, kept={"mlp": kept})


def plan_student(model: Any, spec: Student, calibration: Statistics | None = None) -> StudentPlan:
    """Plan a student of `model`.

    Args:
        model: The teacher, a transformers model of a known family.
        spec: The recipe's `student` section.
        calibration: Statistics of one calibration pass; policies, scores and allocations that read them need it.

    Raises:
        InputError: An unknown family, a layer out of range, a width or a target that cannot be had, or a missing
            calibration.
    """
    depths = _check_layers(model, spec)
    sides = list(depths)
    asked = {"main": spec.depth, "encoder": spec.encoder_layers}
    kept = {side: choose_layers(model, side, asked[side], calibration) for side in sides}
    scored = [
        _score_layer(mlp, index, side, spec, calibration and calibration.of(side))
        for side, index, mlp in placed_mlps(model)
        if index in kept[side]
    ]
    whole = [layer.side == "main" and layer.index in spec.mlp.protect for layer in scored]
    influence = None
    if calibration is not None:
        influence = [float(calibration.of(layer.side).block_influence()[layer.index]) for layer in scored]
    widths_for = partial(layer_widths, [layer.ranked for layer in scored], spec.mlp, influence=influence, whole=whole)

    def plan_for(widths: Sequence[int]) -> StudentPlan:
        cut = [(layer.side, layer.cut(width)) for layer, width in zip(scored, widths, strict=True)]
        return StudentPlan(
            model_type=model.config.model_type,
            teacher_layers=depths["main"],
            layers=[layer for side, layer in cut if side == "main"],
            teacher_encoder_layers=depths.get("encoder"),
            encoder_layers=[layer for side, layer in cut if side == "encoder"] if "encoder" in sides else None,
            layer_policy=policy_of(spec.depth),
            mlp_score=spec.mlp.score,
            mlp_allocation="explicit" if isinstance(spec.mlp.keep, list) else spec.mlp.allocate,
            calibration=None if calibration is None else calibration.fingerprint,
            layer_scores={} if calibration is None else _layer_scores(calibration, sides),
        )

    keep, outcomes = spec.mlp.keep, {}
    if spec.target is not None:
        keep, outcomes[f"student.target.{spec.target.kind}"] = _solve(model, spec, scored, whole, widths_for, plan_for)
    plan = plan_for(widths_for(keep))
    return plan.model_copy(update={"outcomes": _outcomes(spec, plan, keep) | outcomes})


def check_student(model: Any, spec: Student) -> None:
    """Refuse, before any work, layers that the teacher does not have and a target that they cannot reach.

    A recipe whose teacher is on the hub was read without knowing its size.

    Raises:
        InputError: With what is wrong.
    """
    if spec.given is not None:
        return
    _check_layers(model, spec)
    check_target(model, spec)


def _check_layers(model: Any, spec: Student) -> dict[StackName, int]:
    """Apply the recipe's rules on layers to the model itself; returns its depths."""
    depths = depths_of(model)
    parts = {"layers": spec.depth, "encoder_layers": spec.encoder_layers, "mlp": spec.mlp}
    if mistakes := list(check_together(parts, TeacherSize(depths["main"], encoder_layers=depths.get("encoder")))):
        raise InputError("; ".join(map(str, mistakes)))
    return depths


def wanted_statistics(spec: Student) -> StatisticsRequest:
    """List the statistics that this student's policies and scores read and that not every calibration collects."""
    asked: dict[StackName, Layers] = {"main": spec.depth}
    if spec.encoder_layers is not None:
        asked["encoder"] = spec.encoder_layers
    needs = {side: layers.READS.get(policy_of(own)) for side, own in asked.items()}
    score = READS.get(spec.mlp.score)  # type: ignore[call-overload]
    return StatisticsRequest(
        gram=score == "gram" if spec.calibration.gram is None else spec.calibration.gram,
        gradients=score == "gradients" if spec.calibration.gradients is None else spec.calibration.gradients,
        losses_without=tuple(side for side, need in needs.items() if need == "losses_without"),
        removals={side: asked[side] for side, need in needs.items() if need == "removals"},
    )


def check_strategies(spec: Student) -> None:
    """Find every function that the section names, the user's own included.

    Raises:
        InputError: A name leads nowhere, or its params do not fit.
    """
    for key, own in (("layers", spec.layers), ("encoder_layers", spec.encoder_layers)):
        if own is not None and isinstance(own.keep, int):
            bind(find(LAYER_POLICIES, own.choose, "layer policy"), own.params, f"student.{key}.params")
    bind(find(SCORES, spec.mlp.score, "score"), spec.mlp.params, "student.mlp.params")
    bind(find(ALLOCATIONS, spec.mlp.allocate, "allocation"), spec.mlp.allocate_params, "student.mlp.allocate_params")
    if spec.mask is not None:
        bind(find(MASK_SCORES, spec.mask.score, "mask score"), spec.mask.params, "student.mask.params")


def _score_layer(mlp: NeuronAxis, index: int, side: StackName, spec: Student, statistics: Statistics | None) -> _Scored:
    score = bind(find(SCORES, spec.mlp.score, "score"), spec.mlp.params, "student.mlp.params")
    weights_in = [weight.detach() for weight in mlp.weights_in]
    values = score(MlpLayer(index, weights_in, mlp.weight_out.detach(), side), statistics)
    expected = (*mlp.weight_out.shape[:-2], mlp.width)
    if not isinstance(values, Tensor) or values.shape != expected or not torch.isfinite(values).all():
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(
            f"student.mlp.score: {spec.mlp.score} must return finite values of shape {expected} for layer {index}, "
            f"it returned {got}"
        )
    return _Scored(side, index, values)


def _layer_scores(calibration: Statistics, sides: Sequence[StackName]) -> dict[str, list[float]]:
    """Collect the figures per teacher layer that layer policies read."""
    figures = {}
    for side in sides:
        statistics, prefix = calibration.of(side), "" if side == "main" else "encoder_"
        figures[f"{prefix}block_influence"] = statistics.block_influence().tolist()
        if f"{side}.without" in statistics.sums:
            figures[f"{prefix}loss_without"] = statistics.loss_without().tolist()
    return figures


def _solve(
    model: Any, spec: Student, scored: list[_Scored], whole: list[bool], widths_for: Any, plan_for: Any
) -> tuple[float, Outcome]:
    """Solve for the share of neurons that meets the target; the share, and asked and got."""
    target = spec.target
    assert target is not None
    free = [layer.width for layer, stays in zip(scored, whole, strict=True) if not stays]
    if not free:
        raise InputError(
            "student.mlp.protect: every kept layer is protected; there is nothing to solve the target with"
        )
    steps = shares(spec.mlp, free)
    if target.kind == "latency":

        def seconds(share: float) -> float:
            student = build_student(model, plan_for(widths_for(share))).to(model.device)
            return latency_ratio(student, model, target.length)

        return solve(target, 1.0, steps, seconds)
    costs, kept = costs_of(model, target), [(layer.side, layer.index) for layer in scored]
    return solve(target, costs.total, steps, lambda share: costs.of(kept, widths_for(share)))


def top_units(scores: Tensor, width: int) -> list[Any] | None:
    """Ascending indices of the `width` highest scores, ties to the lower index; None when all are kept.

    For experts, scores are [E, F] and each expert has its own list.
    """
    if width == scores.shape[-1]:
        return None
    # A stable sort of the negated scores breaks ties by index, which topk does not promise.
    order = (-scores.double()).argsort(dim=-1, stable=True)
    return order[..., :width].sort(dim=-1).values.tolist()


def _outcomes(spec: Student, plan: StudentPlan, keep: Any) -> dict[str, Outcome]:
    """Write down what was asked and what the plan gives, by recipe key."""
    outcomes = {}
    stacks = {"layers": (spec.layers, plan.layers), "encoder_layers": (spec.encoder_layers, plan.encoder_layers)}
    for key, (own, stack) in stacks.items():
        if own is not None:
            got = ", ".join(str(layer.teacher_layer) for layer in stack or [])
            outcomes[f"student.{key}.keep"] = Outcome(asked=str(own.keep), got=got)
    placed = [(side, layer) for side in ("encoder", "main") for layer in plan.stack(side)]
    names = [f"{'encoder ' if side == 'encoder' else ''}layer {layer.teacher_layer}" for side, layer in placed]
    sizes = {name: f"{layer.width} of {layer.teacher_width}" for name, (_, layer) in zip(names, placed, strict=True)}
    got, *others = dict.fromkeys(sizes.values())
    if others:
        got = ", ".join(f"{size} in {name}" for name, size in sizes.items())
    free = [layer for side, layer in placed if side == "encoder" or layer.teacher_layer not in spec.mlp.protect]
    each = keep if isinstance(keep, list) else [keep] * len(free)
    pairs = zip(each, free, strict=True)
    wanted = sum(int(one * layer.teacher_width + EXACT) if isinstance(one, float) else one for one, layer in pairs)
    rounded = spec.mlp.allocate != "threshold" and sum(layer.width for layer in free) < wanted
    reason = f"rounded down to a multiple of {spec.mlp.multiple_of}" if rounded else ""
    if isinstance(keep, list):
        asked = str(keep)
    elif spec.mlp.allocate == "threshold":
        asked = f"what {spec.mlp.allocate_params} gives"
    else:
        asked = f"{keep:g} of {placed[0][1].teacher_width}" + (" (from student.target)" if spec.target else "")
    return outcomes | {"student.mlp.keep": Outcome(asked=asked, got=got, reason=reason)}

"""Rules across sections, on typed sections and on what the teacher's files say about its size.

A rule asks for the parts of a recipe that it reads by the names of its parameters, and is left out where one of them is
wrong in itself, so that it speaks although other sections are wrong. Paths start at the top of the recipe.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from distill.recipe import arm_rules, names, task_rules, teachers
from distill.recipe.cache_rules import cache_is_read, cached_outputs_are_enough
from distill.recipe.fields import KeyPath, Mistake
from distill.recipe.locate import TeacherSize
from distill.recipe.sections import Lora, Optimization, Release, Training
from distill.recipe.student import Calibration, Layers, Mask, Mlp, Repair, Target
from distill.recipe.task_rules import MLP
from distill.recipe.terms import TERM_KEYS, Term

PARTS: dict[str, KeyPath] = {
    **{name: (name,) for name in ("teacher", "teachers", "data", "losses", "training", "evaluation", "release")},
    **{
        name: ("student", name)
        for name in ("layers", "encoder_layers", "mlp", "mask", "target", "calibration", "repair")
    },
    "fit": ("teacher", "fit"),
    "given": ("student", "from"),
}
"""Parts that a rule may ask for; beside these `terms`, the valid loss terms by position; `size`, the teacher's; and
`own`, the student's where one is given, else the teacher's."""
KEEP_FIRST = ("modernbert",)
"""Families whose first layer is built unlike the others, which cannot do without it."""
STACKS: tuple[KeyPath, KeyPath] = (("student", "layers"), ("student", "encoder_layers"))


def check_together(
    parts: Mapping[str, Any], size: TeacherSize | None = None, own: TeacherSize | None = None
) -> Iterator[Mistake]:
    """Yield what is wrong between parts.

    Args:
        parts: As `PARTS` names them.
        size: Of the first teacher; None: only what holds for every teacher.
        own: Of a student that is given.
    """
    if {"teacher", "teachers"} <= parts.keys():
        yield from teachers.one_way_to_teach(parts["teacher"], parts["teachers"])
    known = {**teachers.resolve_teacher(parts), "size": size or TeacherSize()}
    known["own"] = own or TeacherSize() if parts.get("given") else known["size"]
    first: KeyPath = ("teachers", 0) if parts.get("teachers") and parts.get("teacher") is None else ("teacher",)
    for rule in RULES:
        wanted = inspect.signature(rule).parameters
        for mistake in rule(**{name: known[name] for name in wanted}) if wanted.keys() <= known.keys() else ():
            moved = (*first, *mistake.path[1:]) if mistake.path[:1] == ("teacher",) else mistake.path
            yield replace(mistake, path=moved)


def layers_exist(layers: Layers, encoder_layers: Layers | None, size: TeacherSize) -> Iterator[Mistake]:
    """Require that the student's layers are layers of the teacher, and that `every` divides them."""
    if encoder_layers is not None and size.layers is not None and size.encoder_layers is None:
        message = "has no effect: the teacher is not an encoder-decoder"
        yield Mistake(STACKS[1], message, "remove it; its depth is student.layers", at="key")
    stacks = zip(STACKS, (layers, encoder_layers), (size.layers, size.encoder_layers), strict=True)
    for path, own, have in stacks:
        if own is None or have is None:
            continue
        if isinstance(own.keep, list):
            for position, layer in enumerate(own.keep):
                if layer >= have and layer not in own.keep[:position]:
                    yield Mistake(
                        (*path, "keep", position), f"the teacher has no layer {layer}", f"use 0 to {have - 1}"
                    )
        elif own.keep > have:
            yield Mistake((*path, "keep"), f"keeps {own.keep} layers, the teacher has {have}", f"use 1 to {have}")
        elif own.choose == "every" and have % own.keep:
            fits = ", ".join(str(number) for number in range(1, have + 1) if have % number == 0)
            message = f"`every` needs a number that divides the teacher's {have} layers; {own.keep} does not"
            yield Mistake((*path, "keep"), message, f"use one of {fits}, or choose: even")


def first_layer_is_kept(layers: Layers, size: TeacherSize) -> Iterator[Mistake]:
    """Require the first layer in families that cannot do without it; policies that read data keep it by themselves."""
    if size.family not in KEEP_FIRST or size.layers is None:
        return
    reason = f"drops layer 0, which {size.family} cannot lose: its other layers are built differently"
    if isinstance(layers.keep, list):
        if layers.keep and layers.keep[0] != 0:
            yield Mistake((*STACKS[0], "keep"), reason, "keep layer 0 as well")
        return
    drops = layers.choose in ("last", "every") or (layers.choose == "even" and layers.keep == 1)
    if drops and layers.keep < size.layers:
        message = f"{layers.choose} with keep: {layers.keep} {reason}"
        yield Mistake((*STACKS[0], "choose"), message, "choose: first or even_rounded keeps it")


def widths_can_be_had(layers: Layers, encoder_layers: Layers | None, mlp: Mlp, size: TeacherSize) -> Iterator[Mistake]:
    """Require widths that the teacher has, and that leave neurons after rounding down."""
    path: KeyPath = (*MLP, "keep")
    if not isinstance(mlp.keep, list):
        yield from _wrong_width(path, mlp.keep, mlp, size.width)
        return
    depths = [_depth(stack) for stack in (layers, encoder_layers) if stack is not None]
    depths += [size.encoder_layers] if size.encoder_layers and encoder_layers is None else []
    # Of a teacher that is not known, e.g. a hub id, nobody knows whether it has an encoder, too.
    if size.layers is not None and len(mlp.keep) != sum(depths):
        yield Mistake(path, f"{len(mlp.keep)} widths for {sum(depths)} kept layers", "give one for each kept layer")
    for position, width in enumerate(mlp.keep):
        yield from _wrong_width((*path, position), width, mlp, size.width)


def _depth(layers: Layers) -> int:
    return layers.keep if isinstance(layers.keep, int) else len(layers.keep)


def _wrong_width(path: KeyPath, keep: float, mlp: Mlp, have: int | None) -> Iterator[Mistake]:
    if have is None:
        return
    multiple, wanted = mlp.multiple_of, _neurons(keep, have)
    least = min(have, -(-max(1, _neurons(mlp.floor or 1, have)) // multiple) * multiple)
    if wanted > have:
        yield Mistake(path, f"keeps {wanted} neurons, the teacher's MLP has {have}", f"use 1 to {have}, or a share")
    elif wanted < min(multiple, have):  # all of them is always a width that can be had
        message = f"{wanted} of {have} neurons, rounded down to a multiple of {multiple} (multiple_of), leaves none"
        yield Mistake(path, message, f"keep at least {min(multiple, have)}, or lower multiple_of")
    elif wanted < least:
        message = f"{wanted} of {have} neurons is less than the floor of {least} (mlp.floor, rounded up to multiple_of)"
        yield Mistake(path, message, "keep more, or lower the floor")


def _neurons(width: float, have: int) -> int:
    return width if isinstance(width, int) else int(width * have + 1e-9)  # as distill.student.allocate


def protected_layers_are_kept(layers: Layers, mlp: Mlp, size: TeacherSize) -> Iterator[Mistake]:
    """Require that layers whose MLP stays whole are layers that the student may keep."""
    for position, layer in enumerate(mlp.protect):
        path = (*MLP, "protect", position)
        if size.layers is not None and layer >= size.layers:
            yield Mistake(path, f"the teacher has no layer {layer}", f"use 0 to {size.layers - 1}")
        elif isinstance(layers.keep, list) and layer not in layers.keep:
            yield Mistake(path, f"layer {layer} is not among the kept layers", f"remove it; {layers.keep} are kept")


def one_width_for_stock_loaders(
    mlp: Mlp, mask: Mask | None, target: Target | None, release: Release, size: TeacherSize
) -> Iterator[Mistake]:
    """Require one width for a uniform release, and for a native one of an encoder-decoder."""
    both = size.encoder_layers is not None
    if release.format == "padded" or (release.format == "native" and not both):
        return
    only = f"release.format: {release.format} has one width for all layers{' of an encoder-decoder' if both else ''}"
    other = "padded" if both else "native or padded"
    fix = f"set release.format to {other}, or make the widths equal"
    if isinstance(mlp.keep, list):
        # An encoder and its decoder may have a width each; whether they do is seen when the student is built.
        if size.width and not both and len({_neurons(width, size.width) for width in mlp.keep}) > 1:
            yield Mistake((*MLP, "keep"), f"different widths, and {only}", fix)
    elif mlp.allocate != "uniform" and ":" not in mlp.allocate:
        yield Mistake((*MLP, "allocate"), f"{mlp.allocate} gives layers different widths, and {only}", fix)
    elif mlp.protect and (_narrows(mlp) or target is not None):
        yield Mistake((*MLP, "protect"), f"protected layers keep more than others, and {only}", fix)
    if mask and mask.compact is True:
        fix = f"write compact: uniform, or set release.format to {other}"
        message = f"layers may lose different numbers of neurons, and {only}"
        yield Mistake(("student", "mask", "compact"), message, fix)


def _narrows(mlp: Mlp) -> bool:
    return type(mlp.keep) is not float or mlp.keep != 1.0


def target_decides_alone(mlp: Mlp, target: Target | None) -> Iterator[Mistake]:
    """Refuse a second rule for the widths beside a target."""
    if target is not None and mlp.changed("keep"):
        message = "student.target says how much is kept, and only one can hold"
        yield Mistake((*MLP, "keep"), message, "remove one of them", at="key")
    elif target is not None and mlp.allocate == "threshold":
        message = "a threshold keeps what it keeps; it cannot meet student.target"
        yield Mistake((*MLP, "allocate"), message, "use uniform, global or sensitivity")


def scores_are_fed(mlp: Mlp, calibration: Calibration) -> Iterator[Mistake]:
    """Refuse a calibration without the statistics that the score reads."""
    key = names.READS.get(mlp.score)  # type: ignore[call-overload]
    if key and getattr(calibration, key) is False:
        message = f"score: {mlp.score} reads what this switches off"
        yield Mistake(("student", "calibration", key), message, "remove it, or choose another score")


def repair_has_work(
    layers: Layers, mlp: Mlp, target: Target | None, repair: Repair, size: TeacherSize
) -> Iterator[Mistake]:
    """Refuse repair steps that have nothing to put right."""
    path: KeyPath = ("student", "repair")
    for step in repair.changed("bias", "refit"):
        if not _narrows(mlp) and mlp.allocate != "threshold" and target is None:
            message = "has no effect: student.mlp.keep is 1.0, so no neuron is removed"
            yield Mistake((*path, step), message, "remove it, or keep less", at="key")
    if repair.merge and _depth(layers) == size.layers:
        message = "has no effect: student.layers.keep drops no layer"
        yield Mistake((*path, "merge"), message, "remove it, or keep fewer layers", at="key")


def some_term_counts(losses: list[Term]) -> Iterator[Mistake]:
    """Refuse a loss that is zero whatever the student does."""
    if not any(term.weight or (term.schedule and term.schedule.weight) for term in losses):
        yield Mistake(("losses",), "no loss term has a weight above zero", "give one a weight", at="key")


def mapped_layers_exist(
    terms: Mapping[int, Term], layers: Layers, encoder_layers: Layers | None, size: TeacherSize
) -> Iterator[Mistake]:
    """Require that terms name stacks that there are, and explicit [student, teacher] pairs layers of both models."""
    for index, term in terms.items():
        path: KeyPath = ("losses", index)
        if size.layers is not None and size.encoder_layers is None and term.stack is not None:
            yield Mistake(
                (*path, "stack"), "has no effect: the teacher is not an encoder-decoder", "remove it", at="key"
            )
            continue
        if isinstance(term.map, str):
            continue
        if size.encoder_layers is not None and term.stack is None and "stack" in TERM_KEYS[term.match].keys:
            message = "the teacher has two stacks, and the pairs may be of either"
            yield Mistake((*path, "map"), message, "add stack: encoder or stack: decoder", at="key")
            continue
        depth, have = _depth(layers), size.layers
        if term.stack == "encoder":
            have = size.encoder_layers
            depth = (have or 0) if encoder_layers is None else _depth(encoder_layers)
        for position, pair in enumerate(term.map):
            for layer, side, most in zip(pair, ("student", "teacher"), (depth, have), strict=True):
                if most and layer >= most:
                    message = f"the {side} has no layer {layer} (pairs are [student, teacher])"
                    yield Mistake((*path, "map", position), message, f"use 0 to {most - 1}")


def compiled_layers_are_not_read(terms: Mapping[int, Term], training: Training) -> Iterator[Mistake]:
    """Refuse terms that read inside of compiled layers."""
    for index, term in terms.items():
        if training.compile is True and term.match in ("attention", "relations"):
            message = f"match: {term.match} reads inside of layers, which training.compile closes"
            yield Mistake(("losses", index, "match"), message, "remove training.compile")


def masked_weights_learn(mask: Mask | None, training: Training) -> Iterator[Mistake]:
    """Refuse masks over weights that adapters stand in for."""
    if mask is not None and training.lora is not None:
        message = "masks choose among weights that learn, and with lora these do not"
        yield Mistake(("training", "lora"), message, "remove student.mask, or lora", at="key")


def patterns_match(
    fit: Optimization | None, training: Training, mask: Mask | None, size: TeacherSize, own: TeacherSize
) -> Iterator[Mistake]:
    """Require that patterns over parameter names match something, as far as the names in the files tell."""
    given: list[tuple[KeyPath, list[str]]]
    given = [(("teacher", "fit", key), getattr(fit, key)) for key in ("freeze", "only") if fit]
    given += [(("training", key), getattr(training, key)) for key in ("freeze", "only")]
    given += [(("student", "mask", "only"), mask.only)] if mask else []
    given += [((*path, "also"), lora.also) for path, lora in _adapters(fit, training)]
    for path, patterns in given:
        whose, known = ("teacher", size) if path[0] == "teacher" or own is size else ("given student", own)
        bare = [name.partition(".")[2] for name in known.tensors]
        for position, pattern in enumerate(patterns):
            # A base model lacks the name that stands in front of its parameters in a model with a head.
            found = fnmatch.filter(known.tensors, pattern) or fnmatch.filter(known.tensors, pattern.partition(".")[2])
            if known.tensors and not found and not fnmatch.filter(bare, pattern):
                message = f"{pattern!r} matches no parameter of the {whose}"
                yield Mistake((*path, position), message, f"there is e.g. {next(iter(known.tensors))}")


def adapted_maps_exist(
    fit: Optimization | None, training: Training, size: TeacherSize, own: TeacherSize
) -> Iterator[Mistake]:
    """Require that patterns over linear maps to be adapted match something, as far as the names in the files tell."""
    for path, lora in _adapters(fit, training):
        whose, known = ("teacher", size) if path[0] == "teacher" or own is size else ("given student", own)
        modules = [name.removesuffix(".weight") for name in known.tensors if name.endswith(".weight")]
        for position, pattern in enumerate([] if lora.targets == "all-linear" else lora.targets):
            one = lora.model_copy(update={"targets": [pattern]})
            if modules and not any(one.pattern_for(module) for module in modules):
                message = f"{pattern!r} matches no linear map of the {whose}"
                yield Mistake((*path, "targets", position), message, f"there is e.g. {modules[-1]}")


def _adapters(fit: Optimization | None, training: Training) -> Iterator[tuple[KeyPath, Lora]]:
    for path, spec in ((("teacher", "fit"), fit), (("training",), training)):
        if spec is not None and spec.lora is not None:
            yield (*path, "lora"), spec.lora


RULES = (
    layers_exist,
    first_layer_is_kept,
    widths_can_be_had,
    protected_layers_are_kept,
    one_width_for_stock_loaders,
    target_decides_alone,
    scores_are_fed,
    repair_has_work,
    arm_rules.repaired_arm_is_repaired,
    arm_rules.another_cut_is_made_where_one_is,
    arm_rules.controls_can_learn,
    some_term_counts,
    mapped_layers_exist,
    task_rules.terms_fit_the_task,
    task_rules.students_answers_are_scored,
    task_rules.metrics_fit_the_task,
    task_rules.harness_has_a_language_model,
    task_rules.embeddings_have_what_is_learnt_and_measured,
    task_rules.majority_is_defined,
    task_rules.gradients_have_a_loss,
    compiled_layers_are_not_read,
    masked_weights_learn,
    task_rules.teacher_fits_the_task,
    task_rules.examples_fit,
    teachers.teachers_go_together,
    teachers.answers_have_a_teacher,
    teachers.every_source_is_taught,
    patterns_match,
    adapted_maps_exist,
    cached_outputs_are_enough,
    cache_is_read,
)

"""Rules about the student, on the recipe as written: layers that exist, widths and targets that can be had."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distill.recipe.checks import View, count, defaults, indices, number
from distill.recipe.document import Finding, KeyPath, at
from distill.recipe.schema import Calibration, Evaluation, Layers, Mlp, Release, Repair, Target
from distill.registry import literal_in, names_in

MLP: KeyPath = ("student", "mlp")
STACKS = ("layers", "encoder_layers")


def _stacks(view: View) -> Iterator[tuple[KeyPath, dict[str, Any], int | None]]:
    """Path and section of each stack that the recipe speaks about, and how many layers the teacher has there."""
    for key, have in zip(STACKS, (view.layers, view.encoder_layers), strict=True):
        path: KeyPath = ("student", key)
        section = view.section(path, Layers)
        if section is not None and (key == "layers" or at(view.data, path) is not None):
            yield path, section, have


def layers_exist(view: View) -> Iterator[Finding]:
    """The student's layers are layers of the teacher, each once and in order."""
    for section, layers, have in _stacks(view):
        path: KeyPath = (*section, "keep")
        wanted, chosen = count(layers.get("keep")), indices(layers.get("keep"))
        if wanted and have and wanted > have:
            yield Finding(path, f"keeps {wanted} layers, the teacher has {have}", f"use 1 to {have}")
        if chosen is None:
            continue
        if not chosen:
            yield Finding(path, "the list names no layer", "name at least one")
        yield from _index_problems(path, chosen, have)
        for key in ("choose", "params", "protect_first", "protect_last"):
            if layers[key] != defaults(Layers)[key]:
                message = "has no effect: `keep` names the layers"
                yield Finding((*section, key), message, "remove it, or give `keep` as a number", at="key")


def _index_problems(path: KeyPath, chosen: list[int], have: int | None) -> Iterator[Finding]:
    for position, index in enumerate(chosen):
        own = (*path, position)
        if index in chosen[:position]:
            yield Finding(own, f"layer {index} is listed twice", "keep one of them")
        elif have is not None and index >= have:
            yield Finding(own, f"the teacher has no layer {index}", f"use 0 to {have - 1}")
        elif position and index < chosen[position - 1]:
            fix = f"write {sorted(set(chosen))}"
            yield Finding(own, f"layer {index} comes after layer {chosen[position - 1]}, not in ascending order", fix)


def encoder_is_there(view: View) -> Iterator[Finding]:
    """Only encoder-decoders have an encoder of their own."""
    path: KeyPath = ("student", "encoder_layers")
    if at(view.data, path) is not None and view.layers is not None and view.encoder_layers is None:
        message = "has no effect: the teacher is not an encoder-decoder"
        yield Finding(path, message, "remove it; its depth is student.layers", at="key")


def policy_can_be_followed(view: View) -> Iterator[Finding]:
    """What a policy is asked for is possible: groups of equal size, and no more protected layers than are kept."""
    honouring = {
        name for name, own in names_in("distill.student.layers", "CHOICES").items() if "protected" in (own or ())
    }
    for path, layers, have in _stacks(view):
        keep, choose = count(layers.get("keep")), layers["choose"]
        if not keep or not isinstance(choose, str):
            continue
        if choose == "every" and have and keep <= have and have % keep:
            fits = ", ".join(str(size) for size in range(1, have + 1) if have % size == 0)
            message = f"`every` needs a number that divides the teacher's {have} layers; {keep} does not"
            yield Finding((*path, "keep"), message, f"use one of {fits}, or choose: even")
        ends = {key: count(layers[key]) or 0 for key in ("protect_first", "protect_last")}
        given = [key for key, size in ends.items() if size > 0]
        if given and choose not in honouring and ":" not in choose:
            fix = f"remove it; it is for {', '.join(sorted(honouring))}"
            yield Finding((*path, given[0]), f"has no effect with choose: {choose}", fix, at="key")
        elif given and min(sum(ends.values()), have or sum(ends.values())) > keep:
            message = f"{sum(ends.values())} layers are protected, and only {keep} are kept"
            yield Finding((*path, given[0]), message, "protect fewer, or keep more")


def width_can_be_had(view: View) -> Iterator[Finding]:
    """The MLP widths are not more than the teacher's and not nothing after rounding down."""
    mlp = view.section(MLP, Mlp)
    multiple, have = count(mlp["multiple_of"]) if mlp else None, view.width
    if mlp is None or multiple is None or multiple < 1:
        return
    path: KeyPath = (*MLP, "keep")
    if not isinstance(mlp["keep"], list):
        if have is not None:
            yield from _width_problems(path, mlp["keep"], multiple, have, mlp["floor"])
        return
    kept = _kept(view)
    if kept is not None and len(mlp["keep"]) != kept:
        yield Finding(path, f"{len(mlp['keep'])} widths for {kept} kept layers", "give one for each kept layer")
    for position, keep in enumerate(mlp["keep"]):
        if have is not None:
            yield from _width_problems((*path, position), keep, multiple, have, mlp["floor"])
    for key in ("allocate", "allocate_params", "protect"):
        if mlp[key] != defaults(Mlp)[key]:
            fix = "remove it, or give `keep` as one number"
            yield Finding((*MLP, key), "has no effect: `keep` lists a width for each layer", fix, at="key")


def _kept(view: View) -> int | None:
    """Layers that the student keeps over all stacks, where known."""
    sizes = []
    for _, layers, _ in _stacks(view):
        chosen = indices(layers.get("keep"))
        sizes.append(len(chosen) if chosen else count(layers.get("keep")))
    if view.layers is None:
        return None  # a hub id: it may have an encoder, too
    if view.encoder_layers is not None and at(view.data, ("student", "encoder_layers")) is None:
        sizes.append(view.encoder_layers)
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _width_problems(path: KeyPath, keep: Any, multiple: int, have: int, floor: Any) -> Iterator[Finding]:
    wanted = _neurons(keep, have)
    if wanted is None:
        return
    least = min(have, -(-max(1, _neurons(floor, have) or 1) // multiple) * multiple)
    if wanted > have:
        yield Finding(path, f"keeps {wanted} neurons, the teacher's MLP has {have}", f"use 1 to {have}, or a share")
    elif wanted < min(multiple, have):  # all of them is always a width that can be had
        message = f"{wanted} of {have} neurons, rounded down to a multiple of {multiple} (multiple_of), leaves none"
        yield Finding(path, message, f"keep at least {min(multiple, have)}, or lower multiple_of")
    elif wanted < least:
        message = f"{wanted} of {have} neurons is less than the floor of {least} (mlp.floor, rounded up to multiple_of)"
        yield Finding(path, message, "keep more, or lower the floor")


def _neurons(value: Any, have: int) -> int | None:
    whole, share = count(value), number(value)
    if whole is not None:
        return whole if whole >= 1 else None
    return int(share * have + 1e-9) if share is not None and 0 < share <= 1 else None  # as distill.student.allocate


def protected_exist(view: View) -> Iterator[Finding]:
    """Layers whose MLP stays whole are layers of the teacher, named once, that the student may keep."""
    mlp, kept = view.section(MLP, Mlp), indices(at(view.data, ("student", "layers", "keep")))
    chosen = indices(mlp["protect"]) if mlp else None
    for position, index in enumerate(chosen or []):
        path = (*MLP, "protect", position)
        if index in (chosen or [])[:position]:
            yield Finding(path, f"layer {index} is listed twice", "keep one of them")
        elif view.layers is not None and index >= view.layers:
            yield Finding(path, f"the teacher has no layer {index}", f"use 0 to {view.layers - 1}")
        elif kept is not None and index not in kept:
            yield Finding(path, f"layer {index} is not among the kept layers", f"remove it; {kept} are kept")


def one_width_for_stock_loaders(view: View) -> Iterator[Finding]:
    """The uniform release format has one width for all layers."""
    mlp, release = view.section(MLP, Mlp), view.section(("release",), Release)
    if mlp is None or release is None or release["format"] != "uniform":
        return
    fix = "set release.format to native or padded, or make the widths equal"
    keep = mlp["keep"]
    if isinstance(keep, list):
        sizes = {_neurons(width, view.width or 10**9) for width in keep}
        # An encoder and its decoder may have a width each; whether they do is seen when the student is built.
        if None not in sizes and len(sizes) > 1 and view.encoder_layers is None:
            yield Finding((*MLP, "keep"), "different widths, and release.format: uniform has one for all layers", fix)
    elif mlp["allocate"] in set(names_in("distill.student.allocate", "ALLOCATIONS")) - {"uniform"}:
        message = f"{mlp['allocate']} gives layers different widths, and release.format: uniform has one for all"
        yield Finding((*MLP, "allocate"), message, fix)
    elif mlp["protect"] and (isinstance(keep, int) or keep != 1.0 or at(view.data, ("student", "target")) is not None):
        message = "protected layers keep more than others, and release.format: uniform has one width for all"
        yield Finding((*MLP, "protect"), message, fix)


def threshold_is_told(view: View) -> Iterator[Finding]:
    """The allocation by threshold has one rule, and no other key says how many neurons are kept."""
    mlp = view.section(MLP, Mlp)
    if mlp is None or mlp["allocate"] != "threshold" or not isinstance(mlp["allocate_params"], dict):
        return
    given = [key for key in ("threshold", "mass") if mlp["allocate_params"].get(key) is not None]
    if len(given) != 1:
        message = "allocate: threshold needs `threshold` or `mass`, one of them"
        fix = "for example allocate_params: {mass: 0.9}"
        yield Finding((*MLP, "allocate_params"), message, fix, at="key")
    if mlp["keep"] != defaults(Mlp)["keep"]:
        yield Finding(
            (*MLP, "keep"), "has no effect: the threshold says how many neurons are kept", "remove it", at="key"
        )


def target_is_one_number(view: View) -> Iterator[Finding]:
    """A target names one size, and nothing else says how wide the MLPs are."""
    path: KeyPath = ("student", "target")
    target, mlp = view.section(path, Target), view.section(MLP, Mlp)
    if at(view.data, path) is None or target is None:
        return
    given = [key for key in ("parameters", "flops", "latency") if target[key] is not None]
    if not given:
        yield Finding(path, "no size is given", "add parameters, flops or latency", at="key")
    for key in given[1:]:
        yield Finding((*path, key), f"{given[0]} is given as well, and only one can hold", "remove one", at="key")
    if given == ["parameters"] and target["length"] != defaults(Target)["length"]:
        yield Finding((*path, "length"), "has no effect on parameters", "remove it", at="key")
    if mlp is not None and mlp["keep"] != defaults(Mlp)["keep"]:
        message = "student.target says how much is kept, and only one can hold"
        yield Finding((*MLP, "keep"), message, "remove one of them", at="key")
    elif mlp is not None and mlp["allocate"] == "threshold":
        message = "a threshold keeps what it keeps; it cannot meet student.target"
        yield Finding((*MLP, "allocate"), message, "use uniform, global or sensitivity")


def needs_are_collected(view: View) -> Iterator[Finding]:
    """What the score reads is not switched off."""
    mlp, calibration = view.section(MLP, Mlp), view.section(("student", "calibration"), Calibration)
    if mlp is None or calibration is None or not isinstance(mlp["score"], str):
        return
    need = literal_in("distill.student.scores", "NEEDS").get(mlp["score"])
    if need in ("gradients", "gram") and calibration[need] is False:
        message = f"score: {mlp['score']} reads what this switches off"
        yield Finding(("student", "calibration", need), message, "remove it, or choose another score")


def repair_has_work(view: View) -> Iterator[Finding]:
    """Each step of the repair has something to put right, its settings a step, and its arm a repaired student."""
    path: KeyPath = ("student", "repair")
    repair, mlp = view.section(path, Repair), view.section(MLP, Mlp)
    if repair is None or mlp is None:
        return
    asked = [name for name in ("bias", "refit", "merge") if repair[name] is True]
    for key, steps in (("ridge", ("refit", "merge")), ("held_out", ("bias", "refit", "merge"))):
        if repair[key] != defaults(Repair)[key] and not set(steps) & set(asked):
            fix = f"remove it, or set {' or '.join(steps)} to true"
            yield Finding((*path, key), "has no effect: no step is asked for that uses it", fix, at="key")
    whole = type(mlp["keep"]) is float and mlp["keep"] == 1.0 and mlp["allocate"] != "threshold"
    whole = whole and at(view.data, ("student", "target")) is None
    for name in {"bias", "refit"} & set(asked) if whole else ():
        message = "has no effect: student.mlp.keep is 1.0, so no neuron is removed"
        yield Finding((*path, name), message, "remove it, or keep less", at="key")
    keep = at(view.data, ("student", "layers", "keep"))
    if "merge" in asked and view.layers and (count(keep) or len(indices(keep) or ())) == view.layers:
        message = "has no effect: student.layers.keep drops no layer"
        yield Finding((*path, "merge"), message, "remove it, or keep fewer layers", at="key")
    arms = at(view.data, ("evaluation", "arms"))
    if isinstance(arms, list) and "repaired" in arms and arms != defaults(Evaluation)["arms"] and not asked:
        message = "nothing is repaired"
        yield Finding(("evaluation", "arms", arms.index("repaired")), message, "remove it, or ask for student.repair")


STUDENT_CHECKS: list[Callable[[View], Iterable[Finding]]] = [
    layers_exist,
    encoder_is_there,
    policy_can_be_followed,
    width_can_be_had,
    protected_exist,
    one_width_for_stock_loaders,
    threshold_is_told,
    target_is_one_number,
    needs_are_collected,
    repair_has_work,
]

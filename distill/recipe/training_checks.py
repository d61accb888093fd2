"""Rules of `training` and `teacher.fit`, and of the teacher beside a training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distill.recipe.checks import View, count, defaults
from distill.recipe.document import Finding, KeyPath, at
from distill.recipe.schema import Fit, Optimization, Teacher, Training

LENGTHS = ("epochs", "steps", "tokens")
ONLY_WITH = (("decay", "schedule", "wsd"), ("betas", "optimizer", "adamw"))
"""(key, the key that it depends on, the value of that key with which it means something)."""


def _optimizations(view: View) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    for path, model in ((("teacher", "fit"), Fit), (("training",), Training)):
        section = view.section(path, model)
        if section is not None and isinstance(at(view.data, path), dict):
            yield path, section


def length_is_given_once(view: View) -> Iterator[Finding]:
    """Training and fitting last for `epochs`, for `steps` or for `tokens`."""
    for path, model in _optimizations(view):
        given = [key for key in LENGTHS if model[key] is not None]
        if not given:
            message = "how long is not said: none of epochs, steps and tokens is given"
            yield Finding(path, message, "add one of them", at="key")
        if len(given) > 1:
            message = f"{' and '.join(given)} are both given, and only one can hold"
            yield Finding((*path, given[-1]), message, "remove one, or set it to null", at="key")


def batch_divides(view: View) -> Iterator[Finding]:
    """A batch consists of whole micro-batches."""
    for path, model in _optimizations(view):
        batch, micro = count(model["batch_size"]), count(model["micro_batch_size"])
        if batch and micro and batch > 0 and micro > 0 and batch % micro:
            fits = next(size for size in range(min(micro, batch), 0, -1) if batch % size == 0)
            message = f"batch_size {batch} is not a multiple of micro_batch_size {micro}"
            yield Finding((*path, "micro_batch_size"), message, f"for example {fits}")


def training_keys_have_effect(view: View) -> Iterator[Finding]:
    """Keys that belong to another key's value are given with that value."""
    for path, model in _optimizations(view):
        for key, other, value in ONLY_WITH:
            if model[other] != value and _given(model[key]) != _given(defaults(Optimization)[key]):
                message = f"has no effect with {other}: {model[other]}"
                yield Finding((*path, key), message, f"remove it; it is for {other}: {value}", at="key")
        if model["ema_release"] is True and model["ema"] is None:
            message = "there is no average to hand on: ema is not given"
            yield Finding((*path, "ema_release"), message, "add ema: 0.999, or remove this", at="key")


def best_is_looked_for(view: View) -> Iterator[Finding]:
    """The best checkpoint is found by evaluations within training."""
    training = view.section(("training",), Training)
    if training and training["keep_best"] is not None and training["evaluate_every"] == 0:
        message = "nothing is measured during training: evaluate_every is 0"
        yield Finding(("training", "keep_best"), message, "give evaluate_every as well", at="key")


def compiled_layers_are_not_watched(view: View) -> Iterator[Finding]:
    """What happens inside a compiled layer cannot be read."""
    training = view.section(("training",), Training)
    for path, term in view.terms():
        if training and training["compile"] is True and term.get("match") in ("attention", "relations"):
            message = f"match: {term['match']} reads inside of layers, which training.compile closes"
            yield Finding((*path, "match"), message, "remove training.compile")


def teacher_has_a_place(view: View) -> Iterator[Finding]:
    """8-bit weights are for GPUs, and are not spread over them."""
    teacher = view.section(("teacher",), Teacher)
    if teacher and teacher["dtype"] == "int8" and teacher["device"] != "same":
        message = f"int8 needs the GPU that the student is on, not device: {teacher['device']}"
        yield Finding(("teacher", "dtype"), message, "write device: same, or another dtype")


def _given(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


TRAINING_CHECKS: list[Callable[[View], Iterable[Finding]]] = [
    length_is_given_once,
    batch_divides,
    training_keys_have_effect,
    best_is_looked_for,
    compiled_layers_are_not_watched,
    teacher_has_a_place,
]

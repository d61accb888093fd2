"""Rules across keys, checked on the recipe as written, so that they speak even when other keys are wrong.

A check takes a `View` and yields findings; `CHECKS` is all of them but those about the student (`student_checks`).
Values of the wrong type are the schema's business (`explain`): a check that meets one says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from distill.errors import InputError
from distill.recipe.document import Finding, KeyPath, at, dotted
from distill.recipe.locate import TeacherSize, ambiguous_folder, is_path, teacher_folder, teacher_size
from distill.recipe.schema import Data, Evaluation, Schedule, Teacher, Term

USED_KEYS = {
    "labels": {"match", "weight", "schedule"},
    "logits": {"match", "weight", "schedule", "loss", "temperature", "scale_by_temperature", "params"},
    "hidden": {"match", "weight", "schedule", "loss", "map", "params"},
    "embeddings": {"match", "weight", "schedule", "loss", "params"},
    "attention": {"match", "weight", "schedule", "loss", "map", "params"},
    "relations": {"match", "weight", "schedule", "loss", "map", "params"},
    "output": {"match", "weight", "schedule", "loss", "params"},
}
"""Keys of a loss term that mean something for what it matches."""


class View:
    """The raw data, read leniently, and what the teacher's folder says."""

    def __init__(self, data: Any, base: Path):
        self.data, self.base = data, base

    def section(self, path: KeyPath, model: type[BaseModel]) -> dict[str, Any] | None:
        """A section with its defaults filled in, all of them when it is absent; None when it is not a section."""
        given = at(self.data, path, default={})
        return {**defaults(model), **given} if isinstance(given, dict) else None

    def terms(self) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
        """Each loss term with its path."""
        losses = at(self.data, ("losses",))
        for index in range(len(losses) if isinstance(losses, list) else 0):
            path: KeyPath = ("losses", index)
            term = self.section(path, Term)
            if term is not None:
                yield path, term

    @cached_property
    def teacher(self) -> TeacherSize | InputError:
        """Size of the teacher; an error when its folder or config.json cannot be read; nothing known for a hub id."""
        model = at(self.data, ("teacher", "model"))
        try:
            folder = teacher_folder(model, self.base) if isinstance(model, str) else None
            return teacher_size(folder) if folder else TeacherSize(None, None)
        except InputError as error:
            return error

    @property
    def layers(self) -> int | None:
        """Number of the teacher's layers, where known."""
        return self.teacher.layers if isinstance(self.teacher, TeacherSize) else None

    @property
    def encoder_layers(self) -> int | None:
        """Number of layers of the teacher's encoder, where it has one of its own."""
        return self.teacher.encoder_layers if isinstance(self.teacher, TeacherSize) else None

    @property
    def width(self) -> int | None:
        """Width of the teacher's MLPs, where known."""
        return self.teacher.width if isinstance(self.teacher, TeacherSize) else None


def defaults(model: type[BaseModel]) -> dict[str, Any]:
    """The default of every key of a section that has one."""
    fields = model.model_fields.items()
    return {name: field.get_default(call_default_factory=True) for name, field in fields if not field.is_required()}


def count(value: Any) -> int | None:
    """A whole number, or None."""
    return value if type(value) is int else None


def number(value: Any) -> float | None:
    """A number as the schema reads it, the text '1e-4' included, or None."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def indices(value: Any) -> list[int] | None:
    """A list of layer indices, or None."""
    valid = isinstance(value, list) and all(type(index) is int and index >= 0 for index in value)
    return value if valid else None


def teacher_is_there(view: View) -> Iterator[Finding]:
    """The teacher's folder can be read, and its name means one thing only."""
    path: KeyPath = ("teacher", "model")
    model = at(view.data, path)
    if not isinstance(model, str):
        return
    if isinstance(view.teacher, InputError):
        message, _, fix = str(view.teacher).partition(": pip install ")
        yield Finding(path, message, f"pip install {fix}" if fix else "")
        return
    folder = ambiguous_folder(model, view.base)
    if folder:
        yield Finding(path, f"ambiguous: {model} is a folder here and could be a hub id", f"write {folder}")
    if at(view.data, ("teacher", "revision")) is not None and (is_path(model) or model.startswith("package:")):
        message = "has no effect: only hub ids have revisions"
        yield Finding(("teacher", "revision"), message, "remove it; `sha256` pins the weights of a folder", at="key")


def random_teacher_is_fitted(view: View) -> Iterator[Finding]:
    """A teacher with random weights knows nothing until it is fitted, and has no weights to verify."""
    teacher = view.section(("teacher",), Teacher)
    if teacher is None or teacher["init"] != "random":
        return
    if teacher["fit"] is None:
        message = "a teacher with random weights has nothing to teach"
        yield Finding(("teacher", "init"), message, "add `fit: {epochs: …, lr: …}` under teacher:")
    if teacher["sha256"] is not None:
        message = "has no effect with init: random, which reads no weights"
        yield Finding(("teacher", "sha256"), message, "remove it", at="key")


def length_fits(view: View) -> Iterator[Finding]:
    """No example is longer than the teacher has positions for."""
    data = view.section(("data",), Data)
    positions = view.teacher.positions if isinstance(view.teacher, TeacherSize) else None
    length = count(data["max_length"]) if data else None
    if length and positions and length > positions:
        message = f"{length} tokens per example, the teacher has {positions} positions"
        yield Finding(("data", "max_length"), message, f"use at most {positions}")


def some_term_counts(view: View) -> Iterator[Finding]:
    """The loss is not zero whatever the student does."""
    weights = [number(term["weight"]) for _, term in view.terms()]
    ends = [at(view.data, (*path, "schedule", "weight")) for path, _ in view.terms()]
    weights += [number(end) for end in ends if end is not None]
    if weights and all(weight == 0 for weight in weights):
        yield Finding(("losses",), "no loss term has a weight above zero", "give one a weight", at="key")


def term_keys_have_effect(view: View) -> Iterator[Finding]:
    """Each key of a term means something for what the term matches."""
    for path, term in view.terms():
        used = USED_KEYS.get(str(term.get("match")))
        for key, default in defaults(Term).items():
            # The default says nothing, and a recipe that was written out in full has them all.
            if used is not None and key not in used and term[key] != default:
                others = " and ".join(f"match: {match}" for match, keys in USED_KEYS.items() if key in keys)
                fix = f"remove it; it is for {others}"
                yield Finding((*path, key), f"has no effect with match: {term['match']}", fix, at="key")


def schedules_lead_somewhere(view: View) -> Iterator[Finding]:
    """A schedule changes something, of what its term has, and ends after it starts."""
    for path, term in view.terms():
        own = (*path, "schedule")
        schedule = view.section(own, Schedule) if isinstance(at(view.data, own), dict) else None
        if schedule is None:
            continue
        if schedule["weight"] is None and schedule["temperature"] is None and not schedule["params"]:
            yield Finding(own, "changes nothing", "give the weight, temperature or params at the end", at="key")
        if schedule["temperature"] is not None and term.get("match") != "logits":
            message = f"has no effect with match: {term.get('match')}"
            yield Finding((*own, "temperature"), message, "remove it; it is for match: logits", at="key")
        start, end = number(schedule["start"]), number(schedule["end"])
        if start is not None and end is not None and start > end:
            yield Finding((*own, "start"), f"start {start:g} comes after end {end:g}", "give shares with start ≤ end")


def mapped_layers_exist(view: View) -> Iterator[Finding]:
    """Explicit [student, teacher] pairs name layers of both models, each pair once."""
    keep = at(view.data, ("student", "layers", "keep"))
    chosen = indices(keep)
    sides = (("student", len(chosen) if chosen else count(keep)), ("teacher", view.layers))
    for path, term in view.terms():
        pairs = term["map"]
        if "map" not in USED_KEYS.get(str(term.get("match")), ()) or not isinstance(pairs, list):
            continue
        if not pairs:
            yield Finding((*path, "map"), "the list maps no layer", "give [student, teacher] pairs, or write plan")
        for position, pair in enumerate(pairs):
            if indices(pair) is None or len(pair) != 2:
                continue
            own = (*path, "map", position)
            if pair in pairs[:position]:
                yield Finding(own, f"the pair {pair} is listed twice", "keep one of them")
            for layer, (side, have) in zip(pair, sides, strict=True):
                if have is not None and have > 0 and layer >= have:
                    message = f"the {side} has no layer {layer} (pairs are [student, teacher])"
                    yield Finding(own, message, f"use 0 to {have - 1}")


def columns_are_for_files(view: View) -> Iterator[Finding]:
    """A built-in corpus has no columns to choose from."""
    data = view.section(("data",), Data)
    if data is None or not isinstance(data.get("source"), str) or is_path(data["source"]):
        return
    for key in ("text", "label"):
        if data[key] != defaults(Data)[key]:
            yield Finding(("data", key), "has no effect: only files have columns to choose", "remove it", at="key")


def listed_once(view: View) -> Iterator[Finding]:
    """Arms and metrics are measured once each."""
    evaluation = view.section(("evaluation",), Evaluation) or {}
    for key in ("arms", "metrics"):
        given = evaluation.get(key)
        names: list[Any] = given if isinstance(given, list) else []
        for position, name in enumerate(names):
            if name in names[:position]:
                path: KeyPath = ("evaluation", key, position)
                yield Finding(path, f"{name} is listed twice in {dotted(path[:-1])}", "keep one of them")


CHECKS: list[Callable[[View], Iterable[Finding]]] = [
    teacher_is_there,
    random_teacher_is_fitted,
    length_fits,
    some_term_counts,
    term_keys_have_effect,
    schedules_lead_somewhere,
    mapped_layers_exist,
    columns_are_for_files,
    listed_once,
]

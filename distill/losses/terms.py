"""From a term of the recipe to functions: its loss with checked parameters, its layers, and its schedule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from distill.errors import InputError
from distill.losses.hidden import HIDDEN
from distill.losses.kinds import cross_entropy, squared_error
from distill.losses.logits import LOGITS
from distill.losses.mapping import LayerMap, Policy
from distill.losses.relation import ATTENTION, RELATION
from distill.losses.trial import try_out
from distill.recipe.schema import Schedule, Term
from distill.recipe.terms import MATCHES
from distill.registry import bind, find

TABLES: dict[str, dict[str, Callable[..., Any]]] = {
    "logits": LOGITS,
    "hidden": HIDDEN,
    "embeddings": HIDDEN,
    "output": HIDDEN,
    "attention": ATTENTION,
    "relations": RELATION,
}
"""What a term matches -> the losses it may name; the first is the default."""
MAPPED = ("hidden", "attention", "relations")
"""Matches that compare layers."""
EMBEDDINGS = (-1, -1)
"""The pair that stands for what goes into the first layer of both models."""

Maps = Callable[[Policy], LayerMap]


@dataclass(frozen=True)
class ResolvedTerm:
    """A term whose names are found and whose parameters are checked."""

    key: str
    """Where it stands in the recipe."""
    name: str
    spec: Term
    function: Callable[..., Tensor]
    """(own, target, parameters…) -> one value per position."""
    pairs: tuple[tuple[int, int], ...] = ()
    """(student layer, teacher layer); the term is the mean over them. Empty for terms on predictions."""

    @property
    def match(self) -> str:
        """What is compared."""
        return self.spec.match

    def at(self, progress: float) -> tuple[float, float, Callable[[Tensor, Any], Tensor]]:
        """Weight, temperature² (or 1) and loss, at this share of the training (0 to 1)."""
        spec, params = self.spec, dict(self.spec.params)
        weight, temperature = spec.weight, spec.temperature
        if spec.schedule is not None:
            moved = partial(_between, share=_share(spec.schedule, progress))
            weight = moved(weight, spec.schedule.weight)
            temperature = moved(temperature, spec.schedule.temperature)
            params |= {name: moved(params[name], end) for name, end in spec.schedule.params.items()}
        if spec.match != "logits":
            return weight, 1.0, partial(self.function, **params)
        scale = temperature**2 if spec.scale_by_temperature else 1.0
        return weight, scale, partial(self.function, temperature=temperature, **params)


def _share(schedule: Schedule, progress: float) -> float:
    """How far a schedule has come, 0 to 1."""
    length = schedule.end - schedule.start
    done = min(1.0, max(0.0, (progress - schedule.start) / length)) if length else float(progress >= schedule.end)
    return done if schedule.shape == "linear" else (1 - math.cos(math.pi * done)) / 2


def _between(start: Any, end: Any, share: float) -> Any:
    return start if end is None else start + (end - start) * share


def resolve(terms: Sequence[Term], head: str, maps: Maps | None) -> list[ResolvedTerm]:
    """Find every loss and check every parameter, so that a wrong one is found before any work is done.

    Raises:
        InputError: an unknown loss, a wrong parameter, a key that the term does not use, a term that the head has
            nothing for, or a loss that fails, or that a student cannot learn from.
    """
    resolved: list[ResolvedTerm] = []
    for index, term in enumerate(terms):
        where = f"losses.{index}"
        _refuse_unused_keys(term, where)
        _refuse_for_head(term, head, where)
        if term.match == "labels":
            function: Callable[..., Any] = squared_error if head == "regression" else cross_entropy
            name = "labels"
        else:
            loss = term.loss or next(iter(TABLES[term.match]))
            function, name = _checked(term, loss, head, where), f"{term.match}.{loss.rpartition(':')[2]}"
        pairs: tuple[tuple[int, int], ...] = (EMBEDDINGS,) if term.match == "embeddings" else ()
        if term.match in MAPPED:
            if maps is None:
                raise ValueError(f"{where}: a term on {term.match} needs `maps`, see Objective")
            pairs = maps(term.map).pairs
        title = _unique(name, [other.name for other in resolved])
        resolved.append(ResolvedTerm(where, title, term, function, pairs))
    return resolved


def _refuse_unused_keys(term: Term, where: str) -> None:
    """A key without effect is a misunderstanding: say so instead of training something else than was asked."""
    fields = type(term).model_fields.items()
    changed = {key for key, field in fields if getattr(term, key) != field.get_default(call_default_factory=True)}
    unused = sorted(changed - {*MATCHES[term.match].keys, "match", "weight", "schedule"})
    if unused:
        raise InputError(f"{where}: a term that matches {term.match} does not use {', '.join(unused)}; remove it")


def _refuse_for_head(term: Term, head: str, where: str) -> None:
    """Terms that would be zero, or mean nothing, whatever the student does."""
    if head == "regression" and term.match == "logits" and term.loss != "logit_mse" and ":" not in (term.loss or ""):
        raise InputError(f"{where}: a regression head has one number, not a distribution; write `loss: logit_mse`")
    if head == "embedding" and term.match == "labels":
        raise InputError(f"{where}: an embedding has no labels; match its output, or logits (similarities)")
    if head != "embedding" and term.match == "output":
        raise InputError(f"{where}: `match: output` compares sentence embeddings; for this head match logits")


def _checked(term: Term, name: str, head: str, where: str) -> Callable[..., Any]:
    """The named loss, its parameters and the ends of their schedules tried out; they are filled in later."""
    function = find(TABLES[term.match], name, what="loss")
    ends = [dict(term.params)]
    if term.match == "logits" and "temperature" in term.params:
        raise InputError(f"{where}.params.temperature: this is a key of the term itself, {where}.temperature")
    if term.schedule is not None:
        _check_schedule(term.schedule, term, function, f"{where}.schedule")
        if term.schedule.params:
            ends.append({**term.params, **term.schedule.params})
    for params in ends:
        given = params | ({"temperature": term.temperature} if term.match == "logits" else {})
        try_out(bind(function, given, where=f"{where}.params"), term.match, head, params, where, name)
    return function


def _check_schedule(schedule: Schedule, term: Term, function: Callable[..., Any], where: str) -> None:
    if schedule.start > schedule.end:
        raise InputError(f"{where}: start {schedule.start} comes after end {schedule.end}")
    if schedule.temperature is not None and term.match != "logits":
        raise InputError(f"{where}.temperature: a term that matches {term.match} has no temperature; remove it")
    for name, end in schedule.params.items():
        values = (term.params.get(name), end)
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            raise InputError(f"{where}.params.{name}: needs a number here and one to start from in the term's params")
        if _is_whole(function, name):
            raise InputError(
                f"{where}.params.{name}: a whole number has nothing in between; remove it from the schedule"
            )


def _is_whole(function: Callable[..., Any], name: str) -> bool:
    """Whether a parameter is a whole number: it says so, or says nothing and its default is one."""
    own = inspect.signature(function).parameters.get(name)
    if own is None:
        return False
    if own.annotation is inspect.Parameter.empty:
        return type(own.default) is int
    return own.annotation in (int, "int", "int | None")


def _unique(name: str, taken: list[str]) -> str:
    """`name`, or `name.2`, `name.3`, … when terms before it have that name."""
    same = sum(other == name or other.rpartition(".")[0] == name for other in taken)
    return f"{name}.{same + 1}" if same else name

"""From a term of the recipe to functions: its loss with checked parameters, its layers, and its schedule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from distill.errors import InputError
from distill.losses.kinds import PREDICTION_KINDS, PredictionKind, cross_entropy
from distill.losses.logits import LOGITS
from distill.losses.mapping import LayerMap, Policy
from distill.losses.matches import EXAMPLE_POSITIONS, MATCHES, Loss, Match, Pair
from distill.losses.slopes import CROSS_ENTROPY, NamedTerm
from distill.recipe.schema import Schedule, Term
from distill.recipe.terms import TERM_KEYS, Stack
from distill.registry import bind, find, is_reference

Maps = Callable[[Policy], LayerMap]

EXAMPLE_COLUMNS = 64
"""At least; widths, classes and vocabularies of real models are others, and a loss has to work with any."""


@dataclass(frozen=True)
class ResolvedTerm:
    """A term whose names are found and whose parameters are checked, at one step of the training."""

    key: str
    """Its place in the recipe, e.g. `losses.0`."""
    name: str
    spec: Term
    match: Match
    function: Loss
    """(student, teacher, parameters…) -> one value per position."""
    pairs: tuple[Pair, ...] = ()
    """The term is the mean over them. Empty for terms on predictions."""
    share: float = 1.0
    """Of the weight: a term on the states of both stacks is the mean of one on each."""
    progress: float = 0.0
    """Share of the training that is done, 0 to 1; schedules follow it."""

    @property
    def weight(self) -> float:
        """Of the sum of its values in the loss."""
        end = self.spec.schedule and self.spec.schedule.weight
        return float(self._follow(self.spec.weight, end) * self.share)

    @property
    def temperature(self) -> float | None:
        """Of the softmax; None: what is compared has none."""
        if "temperature" not in TERM_KEYS[self.spec.match].keys:
            return None
        return float(self._follow(self.spec.temperature, self.spec.schedule and self.spec.schedule.temperature))

    @cached_property
    def params(self) -> dict[str, Any]:
        """Keyword arguments of the function, temperature included."""
        params, schedule = dict(self.spec.params), self.spec.schedule
        if schedule is not None:
            params |= {name: self._follow(params[name], end) for name, end in schedule.params.items()}
        return params if self.temperature is None else {"temperature": self.temperature, **params}

    @property
    def scale(self) -> float:
        """Temperature², or 1."""
        return self.temperature**2 if self.temperature is not None and self.spec.scale_by_temperature else 1.0

    @property
    def named(self) -> NamedTerm:
        """The same by name, for those who compute it by other methods; "" where the function is the user's own."""
        known = {CROSS_ENTROPY: cross_entropy, **LOGITS}
        name = next((name for name, each in known.items() if each is self.function), "")
        return NamedTerm(name, self.scale, self.params)

    @property
    def to_temperature_one(self) -> float:
        """Factor that brings its values to temperature 1; near the teacher they fall as 1 / temperature²."""
        return (self.temperature or 1.0) ** 2 / self.scale

    @property
    def changes(self) -> bool:
        """True where more than the weight follows a schedule."""
        schedule = self.spec.schedule
        return schedule is not None and bool(schedule.params or schedule.temperature is not None)

    def total(self, *compared: Any) -> Tensor:
        """Sum the values of the loss over positions, times `scale`; `compared` is what the match's `values` takes.

        Raises:
            InputError: the loss cannot compare these two models, whose widths or heads do not fit.
        """
        try:
            return self.scale * self.match.values(partial(self.function, **self.params), *compared).sum()
        except ValueError as error:
            raise InputError(f"{self.key}: {self.name}: {error}") from error

    def _follow(self, start: Any, end: Any) -> Any:
        """Follow the schedule from one value to another; None: it does not change."""
        if self.spec.schedule is None or end is None:
            return start
        return start + (end - start) * _share_done(self.spec.schedule, self.progress)


def _share_done(schedule: Schedule, progress: float) -> float:
    """Compute how far a schedule has come, 0 to 1."""
    length = schedule.end - schedule.start
    done = min(1.0, max(0.0, (progress - schedule.start) / length)) if length else float(progress >= schedule.end)
    return done if schedule.shape == "linear" else (1 - math.cos(math.pi * done)) / 2


def resolve(
    terms: Sequence[Term], kind: str, maps: Maps | None, encoder_maps: Maps | None = None
) -> list[ResolvedTerm]:
    """Find every loss and check every parameter, so that a wrong one is found before any work is done.

    Raises:
        InputError: an unknown loss, a wrong parameter, a key that the term does not use, a term that the kind of
            predictions has nothing for, a stack that there is not, or a loss of the user's own that fails or that a
            student cannot learn from.
    """
    resolved: list[ResolvedTerm] = []
    for index, term in enumerate(terms):
        key, match = f"losses.{index}", MATCHES[term.match]
        loss = term.loss or match.default
        if problem := match.problem(kind, loss or ""):
            raise InputError(f"{key}: {problem}")
        function, name = PREDICTION_KINDS[kind].label_loss, str(term.match)
        if loss is not None:
            function = _check_loss(term, match, loss, PREDICTION_KINDS[kind], key)
            name += f".{loss.rpartition(':')[2]}"
        stacks = _stacks(term, key, encoder_maps is not None)
        for stack in stacks:
            own = match.of_encoder if stack == "encoder" else match
            pairs = own.pairs
            if "map" in TERM_KEYS[term.match].keys:
                mapped = encoder_maps if stack == "encoder" else maps
                assert mapped is not None, f"a term on {term.match} needs `maps`, see Objective"
                pairs = mapped(term.map).pairs
            full = f"{name}.{stack}" if encoder_maps is not None and "stack" in TERM_KEYS[term.match].keys else name
            title = _number_name(full, [other.name for other in resolved])
            resolved.append(ResolvedTerm(key, title, term, own, function, pairs, 1 / len(stacks)))
    return resolved


def _stacks(term: Term, key: str, two: bool) -> tuple[Stack, ...]:
    """List the stacks whose layers a term compares, in the order of the forward pass."""
    if term.stack is not None:
        if not two:
            raise InputError(f"{key}.stack: the teacher is not an encoder-decoder; remove it")
        return (term.stack,)
    if not two or "stack" not in TERM_KEYS[term.match].keys:
        return ("decoder",)
    if not isinstance(term.map, str):
        raise InputError(f"{key}.map: the pairs may be of either stack; add stack: encoder or stack: decoder")
    return ("encoder", "decoder")


def _check_loss(term: Term, match: Match, name: str, kind: PredictionKind, where: str) -> Loss:
    """Find a loss and check its parameters at both ends of their schedules; they are filled in later."""
    try:
        function = find(match.losses, name, what="loss")
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    heated = "temperature" in TERM_KEYS[term.match].keys
    takes = inspect.signature(function).parameters.values()
    if heated and not any(each.name == "temperature" or each.kind is each.VAR_KEYWORD for each in takes):
        raise InputError(
            f"{where}: {name} takes no temperature; a loss of match: {term.match} is called as "
            f"function(student, teacher, *, temperature=1.0, …)"
        )
    ends = [dict(term.params)]
    if term.schedule is not None:
        _check_schedule(term.schedule, function, f"{where}.schedule")
        if term.schedule.params:
            ends.append({**term.params, **term.schedule.params})
    for params in ends:
        given = params | ({"temperature": term.temperature} if heated else {})
        loss = bind(function, given, where=f"{where}.params")
        if params or is_reference(name):  # tests have called the built-in losses with their own defaults
            _try_out(loss, match, kind, params, where, name)
    return function


def _check_schedule(schedule: Schedule, function: Loss, where: str) -> None:
    """Refuse a schedule of a whole number: a parameter that says so, or that says nothing and has one as default."""
    parameters = inspect.signature(function).parameters
    for name in [name for name in schedule.params if name in parameters]:
        annotation, default = parameters[name].annotation, parameters[name].default
        unsaid = annotation is inspect.Parameter.empty
        if type(default) is int if unsaid else annotation in (int, "int", "int | None"):
            raise InputError(
                f"{where}.params.{name}: a whole number has nothing in between; remove it from the schedule"
            )


def _try_out(loss: Loss, match: Match, kind: PredictionKind, params: Mapping[str, Any], where: str, name: str) -> None:
    """Call a loss with made-up numbers and see whether a student can learn from what it returns.

    Raises:
        InputError: it fails, does not return one value per position, or has no gradient for the student.
    """
    whole = [number for number in params.values() if type(number) is int and 0 < number <= 4096]
    # Twice, as a whole number may also say how many of the columns are chosen.
    columns = (kind.classes if match.on_logits else None) or math.lcm(EXAMPLE_COLUMNS, *(2 * n for n in whole[:2]))
    # Where kernels of one's own run. A build for GPUs names one also on a machine that has none.
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = found or torch.device("cpu")
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        generator = torch.Generator().manual_seed(0)
        student, *others = match.example(lambda *shape: torch.randn(shape, generator=generator).to(device), columns)
        leaves = [tensor.requires_grad_() for tensor in (student if isinstance(student, list) else [student])]
        try:
            values = loss(student, *others)
        except Exception as error:
            problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise InputError(
                f"{where}.params: {problem} (from {name}, tried on {EXAMPLE_POSITIONS} positions)"
            ) from error
        _check_values(values, others[-1].shape[:-1], f"{where}: {name}")
        try:
            slopes = torch.autograd.grad(values.sum(), leaves, allow_unused=True) if values.requires_grad else [None]
        except RuntimeError as error:
            raise InputError(f"{where}: {name} has no gradient: {error}") from error
    if all(slope is None for slope in slopes):
        raise InputError(
            f"{where}: {name} has no gradient for the student, which would learn nothing from it; compute it from the "
            "student's tensor, without detach(), item(), numpy() or argmax()"
        )


def _check_values(values: Any, shape: tuple[int, ...], name: str) -> None:
    """Refuse what is not one number per position: a loss with its own mean would weigh every micro-batch the same."""
    if isinstance(values, Tensor) and values.shape == shape and values.is_floating_point():
        return
    found = f"{tuple(values.shape)} {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
    raise InputError(f"{name} must return one value per position, {tuple(shape)}, got {found}")


def _number_name(name: str, taken: list[str]) -> str:
    """Give `name`, or `name.2`, `name.3`, … when terms before it have that name."""
    same = sum(other == name or other.rpartition(".")[0] == name for other in taken)
    return f"{name}.{same + 1}" if same else name

"""Several teachers: the items of `teachers`, and who teaches the rows of which source by how much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, StrictStr

from distill.recipe import names
from distill.recipe.data import Data
from distill.recipe.fields import Mistake, Positive
from distill.recipe.sections import Teacher, Training
from distill.registry import suggest


class Member(Teacher):
    """One of several teachers, with the keys of `teacher`."""

    weight: Positive = 1.0
    """Its share of the mixture, relative to those of the others that teach the same rows."""
    sources: Annotated[list[StrictStr], Field(min_length=1)] | None = None
    """Training sources that it teaches, by their names under `data`; null: all of them."""


def teaching_shares(teachers: Sequence[Member], sources: Sequence[str]) -> list[list[float]]:
    """Compute the share that each teacher has in teaching the rows of each source; every row of the table sums to 1.

    Sources that no teacher teaches, those of other held-out rows, are left to the first one.
    """
    table = []
    for source in sources:
        weights = [one.weight if one.sources is None or source in one.sources else 0.0 for one in teachers]
        if not any(weights):
            weights = [1.0, *[0.0] * (len(teachers) - 1)]
        table.append([weight / sum(weights) for weight in weights])
    return table


def source_names(data: Data) -> list[str]:
    """List the sources of all splits and sets by name, each once; an example's route is its place in this list."""
    return list(dict.fromkeys(source.source for split in data.splits for source in data.origins(split)))


def one_way_to_teach(teacher: Teacher | None, teachers: Sequence[Member]) -> Iterator[Mistake]:
    """Require `teacher` or `teachers`, and not both."""
    if teacher is None and not teachers:
        message = "missing; give a section with the keys model, fit, …, or a list of such sections as teachers"
        yield Mistake(("teacher",), message, at="key")
    elif teacher is not None and teachers:
        yield Mistake(("teachers",), "teacher is given as well, and only one can hold", "remove one of them", at="key")


def resolve_teacher(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Let the first of `teachers` stand for `teacher` where rules ask for it; parts that are not given are left out."""
    first = next(iter(parts.get("teachers") or ()), None)
    own = {"teacher": first, "fit": first.fit} if first is not None and parts.get("teacher") is None else {}
    known = {**parts, **own}
    return {name: value for name, value in known.items() if value is not None or name not in ("teacher", "layers")}


def teachers_go_together(teachers: Sequence[Member], data: Data) -> Iterator[Mistake]:
    """Refuse several teachers of which one needs a training, a placement or vectors of its own."""
    if len(teachers) > 1 and data.task == "embedding":
        message = "vectors of different teachers lie in different spaces, and nothing is between them"
        yield Mistake(("teachers",), message, "write teacher: with one of them", at="key")
    for number, one in enumerate(teachers if len(teachers) > 1 else ()):
        if number and one.fit is not None:
            message = "only the first of several teachers is fitted here"
            yield Mistake(
                ("teachers", number, "fit"), message, "fit it in a run of its own, and name its folder", "key"
            )
        if one.dtype == "fp8":
            message = "what fp8 changes is judged for one teacher alone"
            yield Mistake(("teachers", number, "dtype"), message, "write bf16")
        if number and one.cache is not None:
            message = "what is kept is the mixture, once"
            yield Mistake(("teachers", number, "cache"), message, "write cache under the first teacher alone", "key")
        if one.cache is not None and one.cache.keep == "hidden" and data.task in names.VOCABULARY_TASKS:
            message = "hidden states of several teachers are not one teacher's, whose head would make logits of them"
            yield Mistake(("teachers", number, "cache", "keep"), message, "write keep: topk")
        if one.device == "sharded":
            message = "several teachers are not sharded"
            yield Mistake(("teachers", number, "device"), message, "write same or cpu")


def answers_have_a_teacher(teachers: Sequence[Member], training: Training) -> Iterator[Mistake]:
    """Refuse answers of the student, which come from no source, where each teacher has its own."""
    if training.on_policy is not None and len(teachers) > 1 and any(one.sources for one in teachers):
        message = "what the student writes comes from no source, and each teacher teaches its own"
        yield Mistake(("training", "on_policy"), message, "remove it, or sources of the teachers", at="key")


def every_source_is_taught(teachers: Sequence[Member], data: Data) -> Iterator[Mistake]:
    """Require that teachers name training sources, and that every training source has a teacher."""
    training = [source.source for source in data.origins("train")]
    for number, one in enumerate(teachers):
        for position, name in enumerate(one.sources or ()):
            if name not in training:
                path, fix = ("teachers", number, "sources", position), f"{suggest(name, training)}There are "
                yield Mistake(path, f"{name} is no training source", f"{fix}{', '.join(training)}")
    for name in training if all(one.sources for one in teachers) and teachers else ():
        if not any(name in (one.sources or ()) for one in teachers):
            message = f"no teacher has {name} among its sources"
            yield Mistake(("teachers",), message, "add it to one of them, or leave out sources of one", at="key")

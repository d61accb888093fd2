"""The vocabulary of a recipe, one model per section: with `sections`, `student` and `terms`, this is the user manual.

Nothing here imports torch: a recipe can be checked on a login node. What a strategy (a score, a loss) accepts beyond
these keys is the keyword-only signature of its function and is given under `params`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any

from pydantic import Field, StrictStr

from distill.recipe.data import AllData, Data, Source
from distill.recipe.fields import Index, Mistake, Section
from distill.recipe.rules import PARTS, check_together
from distill.recipe.sections import Arm, Evaluation, Format, Optimization, Release, Teacher, Training
from distill.recipe.student import Layers, Mask, Mlp, Repair, Student, Target
from distill.recipe.teachers import Member
from distill.recipe.terms import Schedule, Term

__all__ = [
    "AllData", "Arm", "Data", "Evaluation", "Format", "Layers", "Mask", "Mlp", "Optimization", "Recipe", "Release",
    "Repair", "Schedule", "Source", "Student", "Target", "Teacher", "Term", "Training", "with_sets",
]  # fmt: skip

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Recipe(Section):
    """Everything about one run. Sections have the names of the packages that do their work."""

    name: Annotated[StrictStr, Field(pattern=NAME)]
    """Names the run folder `runs/<name>`."""
    seed: Index = 0
    """Every random choice follows from this number."""
    teacher_: Annotated[Teacher | None, Field(alias="teacher")] = None
    """The model that teaches. Give `teacher` or `teachers`."""
    teachers: list[Member] = []
    """Several of them, of one vocabulary: their mixture teaches, or each the rows of its own sources. The student is
    cut from the first, terms on layers compare with it, and evaluation shows it as `teacher`."""
    student: Student
    data: Data
    losses: Annotated[list[Term], Field(min_length=1)]
    training: Training
    evaluation: Evaluation = Evaluation()
    release: Release = Release()

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse sections that do not go together."""
        yield from check_together(self.parts)

    @property
    def rows(self) -> AllData:
        """The rows that training and evaluation read, by split."""
        return with_sets(self.data, self.evaluation)

    @property
    def parts(self) -> dict[str, Any]:
        """The parts that rules across sections ask for."""
        parts = {name: self.get(path) for name, path in PARTS.items()}
        return {**parts, "terms": dict(enumerate(self.losses))}

    @property
    def teacher(self) -> Teacher:
        """The only teacher, or the first of several."""
        given = self.teacher_ or next(iter(self.teachers), None)
        assert given is not None, "a recipe without a teacher is refused"
        return given

    @property
    def mixes(self) -> bool:
        """Tell whether several teachers teach."""
        return len(self.teachers) > 1

    @property
    def routes(self) -> bool:
        """Tell whether who teaches an example depends on its source."""
        return self.mixes and any(one.sources for one in self.teachers)

    @property
    def models(self) -> dict[str, Teacher]:
        """The models that the recipe names, by their keys."""
        taught = {f"teachers.{number}.model": one for number, one in enumerate(self.teachers)}
        given = self.student.given
        return {**(taught or {"teacher.model": self.teacher}), **({} if given is None else {"student.from": given})}

    def with_paths(self, rename: Callable[[str], str]) -> Recipe:
        """Return the recipe with other names for its models and sources, e.g. absolute paths."""
        one, given = self.teacher_, self.student.from_
        members = [
            own.model_copy(update={"model": rename(own.model), "sources": own.sources and [*map(rename, own.sources)]})
            for own in self.teachers
        ]
        changes = {
            "teacher_": one and one.model_copy(update={"model": rename(one.model)}),
            "teachers": members,
            "student": self.student.model_copy(update={"from_": given and rename(given)}),
            **{name: getattr(self, name).with_sources(rename) for name in ("data", "evaluation")},
        }
        return self.model_copy(update=changes)


def with_sets(data: Data, evaluation: Evaluation | None) -> AllData:
    """Join the rows of `data` and those of `evaluation.sets`."""
    return AllData.model_construct(**dict(data), sets=evaluation.sets if evaluation else {})


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors (`distill schema > recipe.schema.json`)."""
    return Recipe.model_json_schema()

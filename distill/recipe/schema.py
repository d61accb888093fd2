"""The vocabulary of a recipe, one model per section: with `sections`, `student` and `terms`, this is the user manual.

Nothing here imports torch: a recipe can be checked on a login node. What a strategy (a score, a loss) accepts beyond
these keys is the keyword-only signature of its function and is given under `params`.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Annotated, Any

from pydantic import Field, StrictStr

from distill.recipe.data import AllData, Data, Source
from distill.recipe.fields import Index, Mistake, Section, dotted
from distill.recipe.rules import PARTS, check_together
from distill.recipe.sections import Arm, Evaluation, Format, Optimization, Release, Teacher, Training
from distill.recipe.student import Layers, Mask, Mlp, Repair, Student, Target
from distill.recipe.terms import Schedule, Term

__all__ = [
    "AllData",
    "Arm",
    "Data",
    "Evaluation",
    "Format",
    "Layers",
    "Mask",
    "Mlp",
    "Optimization",
    "Recipe",
    "Release",
]
__all__ += ["Release", "Repair", "Schedule", "Source", "Student", "Target", "Teacher", "Term", "Training", "with_sets"]

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Recipe(Section):
    """Everything about one run. Sections have the names of the packages that do their work."""

    name: Annotated[StrictStr, Field(pattern=NAME)]
    """Names the run folder `runs/<name>`."""
    seed: Index = 0
    """Every random choice follows from this number."""
    teacher: Teacher
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
        parts = {name: attrgetter(dotted(path))(self) for name, path in PARTS.items()}
        return {**parts, "terms": dict(enumerate(self.losses))}


def with_sets(data: Data, evaluation: Evaluation | None) -> AllData:
    """Join the rows of `data` and those of `evaluation.sets`."""
    return AllData.model_construct(**dict(data), sets=evaluation.sets if evaluation else {})


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors (`distill schema > recipe.schema.json`)."""
    return Recipe.model_json_schema()

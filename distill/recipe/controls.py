"""Settings of control arms that differ from those of the student's training."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Annotated, Any

from pydantic import Field

from distill.recipe.fields import Count, Mistake, Positive, Section


class Grid(Section):
    """Settings that are tried one by one; the best on the validation split is the arm."""

    lr: Annotated[list[Positive], Field(min_length=1)] | None = None
    """Peak learning rates."""
    steps: Annotated[list[Count], Field(min_length=1)] | None = None
    """Lengths in optimizer steps."""

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse a grid with nothing to choose, and values that are listed twice."""
        for key in ("lr", "steps"):
            yield from self.repeated(key, "{}")
        if len(self.points) < 2:
            yield Mistake((), "there is nothing to choose from", "give two or more values of lr or steps", at="key")

    @property
    def points(self) -> list[dict[str, Any]]:
        """Every combination of the values."""
        given = {key: values for key in ("lr", "steps") if (values := getattr(self, key))}
        return [dict(zip(given, values, strict=True)) for values in product(*given.values())]


class Control(Section):
    """A control arm's own length and speed; what is not given is that of `training`."""

    lr: Positive | None = None
    """Peak learning rate."""
    steps: Count | None = None
    """Optimizer steps."""
    epochs: Positive | None = None
    """Passes over the examples that the arm learns from: of `labels_only`, those with a label."""
    grid: Grid | None = None
    """Values to try in place of these keys; the best by the headline metric on the validation split is kept."""

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse two lengths, and keys whose values the grid gives."""
        if self.steps is not None and self.epochs is not None:
            message = "steps and epochs are both given, and only one can hold"
            yield Mistake(("epochs",), message, "remove one, or set it to null", at="key")
        gives = self.grid.points[0] if self.grid else {}
        for key in self.changed("lr", "steps", "epochs"):
            if key in gives or (key == "epochs" and "steps" in gives):
                yield Mistake((key,), "has no effect beside the grid's own values", "remove it", at="key")

    @property
    def tries(self) -> list[dict[str, Any]]:
        """The settings that are trained with, each as the keys that differ from `training`."""
        own = {key: getattr(self, key) for key in self.changed("lr", "steps", "epochs")}
        return [own | point for point in (self.grid.points if self.grid else [{}])]


class Controls(Section):
    """Own settings of the control arms that are trained, by arm."""

    labels_only: Control = Control()
    random_cut: Control = Control()
    from_scratch: Control = Control()

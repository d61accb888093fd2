"""The error tree.

DistillError
├── RecipeError(ValueError)     the recipe is wrong: every problem, with file, line, key and fix       exit code 2
├── InputError(ValueError)      a path, model or data file named by the user is wrong                  exit code 2
├── RunError(RuntimeError)      the work itself failed (a gate, a diverged run)                        exit code 1
└── Stopped                     a signal arrived; a checkpoint was saved, the same command continues   exit code 75
"""

from __future__ import annotations

from dataclasses import dataclass


class DistillError(Exception):
    """Root of every error that distill raises on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe: where it is, what is wrong and how to put it right."""

    where: str
    """`file:line:column`, or `override 'training.lr=…'` for a value given on the command line."""
    key: str
    """Dotted key, e.g. `student.layers.keep`."""
    message: str
    fix: str = ""

    def __str__(self) -> str:
        fix = f"\n      fix: {self.fix}" if self.fix else ""
        return f"{self.where}: {self.key}: {self.message}{fix}"


class RecipeError(DistillError, ValueError):
    """All problems of one recipe, in the order of the file."""

    exit_code = 2

    def __init__(self, problems: list[Problem]):
        self.problems = list(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"the recipe has {count}", *(f"  {problem}" for problem in problems)]))


class InputError(DistillError, ValueError):
    """A path, model or data file that the user named cannot be used."""

    exit_code = 2


class RunError(DistillError, RuntimeError):
    """The work failed while it was running."""

    exit_code = 1


class Stopped(DistillError):
    """A signal asked the run to stop; everything up to the named step is saved."""

    exit_code = 75

"""What is looked at before the first stage, so that a mistake is not found after hours."""

from __future__ import annotations

from distill.data import TASKS
from distill.evaluation.metrics import METRICS
from distill.learning import check_training
from distill.losses import LayerMap, Objective
from distill.masking import check_score
from distill.registry import find
from distill.repairs import check_family
from distill.session import Session
from distill.student import check_strategies


def check_names(session: Session) -> None:
    """Find every function that the recipe names, the user's own included, before hours are spent.

    Raises:
        InputError: A name leads nowhere, its params do not fit, a package is missing, or a repair is not for this
            teacher.
    """
    recipe, task = session.recipe, find(TASKS, session.recipe.data.task, "task")()
    check_strategies(recipe.student)
    check_score(recipe)
    Objective(recipe.losses, task.head, lambda _policy: LayerMap(((0, 0),)))
    for name in recipe.evaluation.metrics or ():
        find(METRICS, name, "metric")
    check_training(recipe, task)
    check_family(session)

"""What is looked at before the first stage, so that a mistake is not found after hours."""

from __future__ import annotations

from distill.data import TASKS
from distill.errors import InputError
from distill.evaluation.metrics import METRICS
from distill.learning import check_training
from distill.losses import LayerMap, Objective
from distill.masking import check_score
from distill.models.attention import relation_widths
from distill.models.layout import layers_of
from distill.models.load import hollow_model
from distill.registry import find
from distill.repairs import check_family
from distill.session import Session
from distill.student import check_strategies


def check_names(session: Session) -> None:
    """Find every function that the recipe names, the user's own included, before hours are spent.

    Raises:
        InputError: A name leads nowhere, its params do not fit, a package is missing, a repair is not for this
            teacher, or there are no labels for what learns from them.
    """
    recipe, task = session.recipe, find(TASKS, session.recipe.data.task, "task")()
    check_strategies(recipe.student)
    check_score(recipe)
    Objective(recipe.losses, task.head, lambda _policy: LayerMap(((0, 0),)))
    for name in recipe.evaluation.metrics or ():
        find(METRICS, name, "metric")
    check_training(recipe, task)
    check_family(session)
    check_labels(session)
    check_relation_heads(session)


def check_labels(session: Session) -> None:
    """Refuse to learn from labels where no training example has one; the last to do so may be trained after hours.

    Raises:
        InputError: With everything in the recipe that learns from labels.
    """
    recipe, texts = session.recipe, session.texts
    if texts.task.head == "next_token" or any(label is not None for _, label in texts.train):
        return
    learners = ["teacher.fit"] if recipe.teacher.fit else []
    terms = [index for index, term in enumerate(recipe.losses) if term.match == "labels"]
    learners += [f"losses.{index} (match: labels)" for index in terms]
    learners += ["evaluation.arms (labels_only)"] if "labels_only" in recipe.evaluation.arms else []
    if learners:
        raise InputError(
            f"data: no training example has a label, and these learn from labels: {', '.join(learners)}; "
            f"give labels to some training examples in {recipe.data.source}, or leave these out of the recipe"
        )


def check_relation_heads(session: Session) -> None:
    """Refuse relation heads that do not divide the teacher's queries, keys or values; the student's are as wide.

    Raises:
        InputError: They do not divide one of these widths.
    """
    asked = {
        f"losses.{index}.params.heads": int(term.params["heads"])  # a whole number, as `Objective` has checked
        for index, term in enumerate(session.recipe.losses)
        if term.match == "relations" and "heads" in term.params and ":" not in (term.loss or "")
    }
    if not asked:
        return
    model = hollow_model(session.source, session.remote_code)
    widths = sorted({width for layer in range(len(layers_of(model))) for width in relation_widths(model, layer)})
    for key, heads in asked.items():
        for width in widths:
            if width % heads:
                raise InputError(f"{key}: {heads} does not divide {width}, a width of the teacher's attention")

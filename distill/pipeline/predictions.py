"""Run models over a split, and every arm over every split; predictions are kept, one row per example."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from safetensors.numpy import save_file

from distill.data import evaluation_batches, observe_batch
from distill.evaluation.arms import ARMS, measured_arms
from distill.evaluation.chance import most_frequent
from distill.evaluation.metrics import compute, measurable
from distill.evaluation.predict import Ask, Rows, merge_rows, predict
from distill.evaluation.recorded_teacher import HOST_BYTES, record_teacher
from distill.files import write_json
from distill.models.trainable import freeze
from distill.pipeline.session import Session
from distill.recipe.schema import Recipe
from distill.student.masks.masks import Masks
from distill.teacher import LiveTeacher, Mixture

COUNTED = 20_000
"""Training examples, at most, whose labels are counted for the most frequent one."""


def predict_split(
    session: Session,
    model: Any,
    split: str,
    shares: tuple[int, int] = (0, 1),
    *,
    quick: bool = False,
    most: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
    **how: Any,
) -> Rows:
    """Predict the examples of a split with one model.

    Args:
        session: The recipe at work.
        model: A transformers model with the task's head, in eval mode.
        split: Name of the split.
        shares: This rank and the number of ranks that take part, among which batches are shared out.
        quick: Leave out what the task observes slowly.
        most: Number of examples, at most: the first ones.
        stopped: Once it says so, leave out the batches that are left.
        **how: `teacher`, `ask` and `precision`, as for `evaluation.predict.predict`.

    Returns:
        The columns that the metrics read, on every rank those of all; empty where no example has a label.
    """
    corpus, examples = session.corpus, session.corpus.splits[split]
    pool, size = range(len(examples))[:most], session.recipe.evaluation.batch_size
    batches = takewhile(lambda _: not stopped(), evaluation_batches(corpus, examples, size, *shares, pool=pool))
    observe = None if quick and not corpus.task.observed_in_training else partial(observe_batch, corpus, examples)
    own = predict(model, batches, corpus.head, vocabulary=session.vocabulary, observe=observe, **how)
    rows = merge_rows(gather_object([own]) if shares[1] > 1 else [own])
    found = dict(corpus.task.finish(rows, corpus.settled)) if rows else {}
    if found and corpus.task.packed:  # a long document fills several rows, which are not independent of each other
        found["document"] = np.array(examples.take(found["example"])["row"])
    return found


def measure(session: Session, rows: Rows, also: str | None = None) -> dict[str, float]:
    """Compute the metrics of the task, and one more, as far as predictions have the columns for them."""
    names = dict.fromkeys([*session.task.metrics_for(session.corpus.head), *([also] if also else [])])
    return compute(measurable([*names], rows), rows) if rows else {}


def save_rows(columns: Rows, path: Path, fingerprint: str) -> None:
    """Write the predictions of an arm: numbers as safetensors, texts as JSON."""
    numbers = {name: values for name, values in columns.items() if values.dtype.kind != "U"}
    save_file(numbers, f"{path}.safetensors", {"data": fingerprint})
    if texts := {name: values.tolist() for name, values in columns.items() if name not in numbers}:
        write_json(path.with_name(f"{path.name}.json"), texts)


def predict_arms(
    session: Session, teacher: LiveTeacher | Mixture, steps: int, shares: tuple[int, int]
) -> dict[str, dict[str, Rows]]:
    """Predict the test split, and those of `evaluation.sets`, with every arm; every rank gets all rows.

    Args:
        session: The recipe at work.
        teacher: Runs once over each split, for all arms.
        steps: Length of the training, which decides how an untrained arm is masked.
        shares: This rank and the number of ranks that take part.

    Returns:
        Split -> arm -> rows.
    """
    corpus, recipe = session.corpus, session.recipe
    splits = [name for name in corpus.splits if name not in ("train", "validation")]
    rows: dict[str, dict[str, Rows]] = {split: {} for split in splits}
    with ExitStack() as stack:
        folders = {split: session.folder.root / f".teacher-{split}-{shares[0]}" for split in splits}
        share = HOST_BYTES // len(splits)
        recordings = {split: stack.enter_context(record_teacher(teacher, folders[split], share)) for split in splits}
        for arm in measured_arms(recipe):
            constant = majority(session) if ARMS[arm].start == "none" else None
            model = teacher.model if constant else load_arm(session, arm, teacher, steps)
            taught, precision = arm == ("teachers" if recipe.mixes else "teacher"), recipe.training.precision
            for split, recording in recordings.items():
                ask = recording if taught else constant
                own = predict_split(session, model, split, shares, teacher=recording, ask=ask, precision=precision)
                rows[split][arm] = own
    return rows


def load_arm(session: Session, arm: str, teacher: LiveTeacher | Mixture, steps: int) -> Any:
    """Load the finished model of an arm beside the teacher, which is one of them."""
    if ARMS[arm].start == "teacher":
        return teacher.model
    device = teacher.model.device
    model = session.load(session.arm_folder(arm), session.near(device)).to(device)
    if ARMS[arm].terms is None:
        mask_untrained(session.recipe, model, steps)
    return model


def mask_untrained(recipe: Recipe, model: Any, steps: int) -> None:
    """Mask a student as its training would before the first step: an arm that is not trained must be so, too."""
    if recipe.student.mask is not None:
        freeze(model, recipe.training.freeze, recipe.training.only)
        Masks(model, recipe.student.mask, steps).after_step(0)


def majority(session: Session) -> Ask:
    """Build a constant predictor of the most frequent label of the training examples."""
    corpus, size = session.corpus, session.recipe.evaluation.batch_size
    pool = corpus.labelled
    step = -(-len(pool) // COUNTED)
    if step > 1:
        session.say(f"  majority: of {len(pool):,} labelled training examples one in {step} is counted")
    batches = evaluation_batches(corpus, corpus.train, size, pool=pool[::step])
    return most_frequent(batches, corpus.head, session.vocabulary or len(corpus.classes))

"""Stage `examine`: look at the teacher's own figures on held-out data before it teaches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from distill.data import evaluation_batches
from distill.data.summary import FEW_TEST_EXAMPLES
from distill.errors import InputError
from distill.evaluation.chance import label_counts, weakness, weakness_of_numbers
from distill.evaluation.table import finite_or_none
from distill.files import write_json
from distill.models.forward import Capture
from distill.pipeline.predictions import measure, predict_split
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage
from distill.pipeline.teachers import load_teaching
from distill.ranks import process_state
from distill.release.wording import format_number

EXAMINED = 512
"""Examples that are looked at, at most."""


def work(session: Session) -> None:
    """Measure the teacher, and stop where it is clearly no better than one that has learnt nothing.

    Raises:
        InputError: It has nothing to teach on these data, and the user has not said to go on.
    """
    shares, corpus = session.shares(), session.corpus
    if shares is None:
        return
    split = "validation" if corpus.validation is not None else "test"
    examples = corpus.splits[split]
    pool = range(len(examples))[:EXAMINED]
    teacher = load_teaching(session, Capture(stop_at_head=True), whole=True)
    how: dict[str, Any] = {"ask": teacher if session.recipe.mixes else None, "precision": teacher.precision}
    rows = predict_split(session, teacher.model, split, shares, quick=True, most=EXAMINED, **how)
    metrics = measure(session, rows)
    figures = {"split": split, "examples": len(pool), "metrics": finite_or_none(metrics), "weakness": ""}
    line = ", ".join(f"{name} {format_number(value)}" for name, value in metrics.items())
    who = "mixture of the teachers" if session.recipe.mixes else "teacher"
    session.say(f"  the {who} on {len(pool)} {split} examples: {line}")
    if corpus.head == "regression" and rows:
        figures["weakness"] = weakness_of_numbers(rows["values"], rows["targets"])
    elif "correct" in rows:
        lengths = np.log(examples.lengths[: len(pool)])  # an answer starts and ends at one of the tokens
        classes = session.vocabulary or session.kind.classes or len(corpus.classes) or round(math.exp(lengths.mean()))
        totals = {name: float(rows[name].sum()) for name in ("nll", "correct", "tokens")}
        own_figures = {"loss": totals["nll"] / totals["tokens"], "accuracy": totals["correct"] / totals["tokens"]}
        batches = evaluation_batches(corpus, examples, session.recipe.evaluation.batch_size, pool=pool)
        figures["weakness"] = weakness(own_figures, label_counts(batches, corpus.head), classes)
    if figures["weakness"]:
        _object(session, str(figures["weakness"]), len(pool))
    if process_state().is_main_process:
        write_json(session.folder.examined, figures)


def _object(session: Session, weakness: str, examples: int) -> None:
    message = f"the teacher is no better than chance on these data: {weakness}"
    if examples < FEW_TEST_EXAMPLES:
        session.say(f"  {message}; going on, as {examples} examples are too few to be sure")
    elif session.accept_weak_teacher:
        session.say(f"  {message}; going on, as asked")
    else:
        raise InputError(
            f"{message}. Its labels may be in another order, its tokenizer another one, the texts of another kind than "
            f"it was trained on; train it with `fit` under teacher:, or go on with --accept-weak-teacher"
        )


def inputs(session: Session) -> dict[str, Any]:
    """List the teacher and the data."""
    return {"teacher": session.teacher_inputs(), "data": session.corpus.fingerprint}


STAGE = Stage("examine", work, inputs, lambda session: [session.folder.examined], together=True)

"""Other forms of the student (`release.also`): refused early, written, compared, and measured where rounded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from distill.data import collate, evaluation_batches, observe_batch
from distill.evaluation.metrics import compute, measurable
from distill.evaluation.predict import predict
from distill.evaluation.table import finite_or_none
from distill.models.forward import MODEL_INPUTS, Batch, Capture, forward, with_decoder_inputs
from distill.models.padding import UNPADDED
from distill.pipeline.session import Session
from distill.recipe.names import TEACHER_METRICS
from distill.release.forms import FORMS, check_forms, write_forms
from distill.release.forms.form import Ask

PROBES = 8
"""Test examples on which all loaders must say the same."""
MEASURED = 512
"""Test examples, at most, on which a form of 8 bits is measured; the student is measured on the same ones."""
LOGITS = 2**26
"""Logits of a batch, at most, as the runtimes give those of a whole batch."""


def check_wanted(session: Session) -> None:
    """Refuse forms that models of the teacher's family cannot have, and missing packages, with an InputError."""
    if session.recipe.release.also:
        check_forms(session.recipe.release.also, session.config_of(session.source), session.task.auto_class)


def probe_of(session: Session, model: Any) -> Batch:
    """Select what the model reads of a few test examples; documents of a row are not told apart."""
    corpus = session.corpus
    probe = with_decoder_inputs(model, collate(corpus, corpus.test, range(min(PROBES, len(corpus.test)))))
    return {name: tensor for name, tensor in probe.items() if name in MODEL_INPUTS and name != "position_ids"}


def try_forms(session: Session, student: Any) -> None:
    """Write every form of a student that is not yet trained, and compare: what fails does so before the training.

    Raises:
        RunError: As `write_forms`.
    """
    if session.recipe.release.also:
        with TemporaryDirectory() as folder:
            make_forms(session, Path(folder), student, measured=False)


def make_forms(session: Session, folder: Path, student: Any, *, measured: bool = True) -> dict[str, dict[str, Any]]:
    """Write the forms into a release that is not yet published, prove them, and measure what rounding to 8 bits costs.

    Returns:
        Title -> what `write_forms` found; of forms in 8 bits `test` as well, from `measure_rounded`.
    """
    names = session.recipe.release.also
    if not names:
        return {}
    model = copy.deepcopy(student).float()
    found = write_forms(folder, model, session.released_preprocessors, names, probe_of(session, student))
    for form in (form for name in names for form in FORMS[name] if measured and form.ask is not None):
        assert form.ask is not None
        if (ask := form.ask(folder / form.path, model)) is not None:
            found[form.title]["test"] = measure_rounded(session, model, ask)
    return found


def measure_rounded(session: Session, model: Any, ask: Ask) -> dict[str, Any]:
    """Compute the metrics of the student in fp32 and of a form on the first test examples, and how far they agree."""
    corpus, task = session.corpus, session.corpus.task
    pool, length = range(min(MEASURED, len(corpus.test))), session.recipe.data.max_length
    rows = max(1, min(session.recipe.evaluation.batch_size, LOGITS // (length * (session.vocabulary or 1))))
    observe = partial(observe_batch, corpus, corpus.test) if task.observed_in_training else None
    own = partial(forward, model, wanted=Capture())

    def batches() -> Iterator[Batch]:
        for batch in evaluation_batches(corpus, corpus.test, rows, pool=pool):
            yield {name: tensor for name, tensor in batch.items() if name not in ("position_ids", UNPADDED)}

    metrics = {}
    for side, answers in (("student", own), ("metrics", ask)):
        found = predict(model, batches(), corpus.head, own, session.vocabulary, observe, answers)
        columns = task.finish(found, corpus.settled)
        names = [*task.metrics_for(corpus.head), *(TEACHER_METRICS if side == "metrics" else ())]
        metrics[side] = finite_or_none(compute(measurable(names, columns), columns))
    return {"examples": len(pool), **metrics}

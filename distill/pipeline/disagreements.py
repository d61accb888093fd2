"""Test examples on which student and teacher answer differently, for the report of the run; no release holds texts."""

from __future__ import annotations

import numpy as np
from safetensors.numpy import load_file

from distill.pipeline.session import Session
from distill.release.table import Table
from distill.release.wording import format_percent, one_line

SHOWN = 10
"""Examples, those of which the teacher is surest."""
LETTERS = 240
"""Of a text."""
EMPTY = Table(("text", "true", "teacher", "student"), [])


def tabulate_disagreements(session: Session) -> Table:
    """List examples with one class each, the truth and both answers with their probabilities; else nothing."""
    paths = [session.folder.predictions / f"{arm}.safetensors" for arm in ("teacher", "distilled")]
    if session.corpus.head != "sequence" or not all(path.is_file() for path in paths):
        return EMPTY
    teacher, student = map(load_file, paths)
    differ = np.flatnonzero(teacher["predictions"] != student["predictions"])
    chosen = differ[np.argsort(-teacher["confidence"][differ], kind="stable")][:SHOWN]
    names, rows = session.corpus.classes, []
    for row in chosen.tolist():
        ids = session.corpus.test[int(student["example"][row])]
        text = one_line(session.tokenizer.decode(ids, skip_special_tokens=True))
        answers = [
            f"{names[int(own['predictions'][row])]} ({format_percent(own['confidence'][row].item())})"
            for own in (teacher, student)
        ]
        cut = text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"
        rows.append((cut, names[int(student["references"][row])], *answers))
    return Table(EMPTY.head, rows, text_columns=4)

"""The bytes and hours of a cached teacher, before they are spent, and what they bring."""

from __future__ import annotations

from distill.pipeline.cache import bytes_of, wanted_columns
from distill.pipeline.entries import find_entries, inputs_of_training
from distill.pipeline.session import Session
from distill.pipeline.timing import StepTime
from distill.pipeline.trainings import Work
from distill.release.table import Printed, Table
from distill.release.wording import MISSING, format_count, format_seconds, format_size

LOOKED_AT = 4096
"""Inputs of the training that are counted; of more, every so-manieth."""


def tabulate_cache(session: Session, work: Work, live: StepTime | None) -> Printed:
    """Tabulate size and time of a cache.

    Args:
        session: A run whose plan is made.
        work: The training that will read it.
        live: The time of its steps with the teacher; None where it is not known.

    Returns:
        Title, table, and when it pays.
    """
    columns, pairs = wanted_columns(session), inputs_of_training(session).pairs
    every = -(-len(pairs) // LOOKED_AT)
    looked = find_entries(session, columns, every)
    tokens = looked.tokens * every
    sizes = {column.name: every * bytes_of(session, column, looked.positions[column.name]) for column in columns}
    total, steps = sum(sizes.values()), work.steps or 0
    times_read = steps * work.tokens / tokens
    once = None if live is None else live.teacher * tokens / work.tokens
    saved = None if once is None or live is None else steps * live.teacher - once
    rows = [
        ("inputs, tokens", f"{format_count(len(looked.examples) * every)}, {format_count(tokens)}"),
        *((name, format_size(size)) for name, size in sizes.items()),
        ("on disk", format_size(total)),
        ("bytes per token", f"{total / tokens:,.0f}"),
        ("the teacher's pass", MISSING if once is None else format_seconds(once)),
        ("the training reads each input", f"{times_read:.1f} times"),
        ("the teacher's time in it, live", MISSING if live is None else format_seconds(steps * live.teacher)),
    ]
    if times_read > 1:
        note = "It pays for this training" + (f": {format_seconds(saved)} saved." if saved and saved > 0 else ".")
    else:
        note = "It does not pay for this training alone, which reads each input once."
    more = (
        "It pays from the second epoch on, for every further student of the same teacher and data, which finds it, and "
    )
    note = f"{note} {more}where the teacher does not fit."
    return Printed("the cached teacher, about", Table(("", "cache"), rows), note)

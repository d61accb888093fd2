"""What the command line prints: lines on standard error, tables on standard output; nothing steers the terminal."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import rich.table
from rich.console import Console
from rich.text import Text

from distill.release.wording import one_line, printable

if TYPE_CHECKING:
    from distill.pipeline import Session
    from distill.release.table import Printed, Table

console = Console(stderr=True, highlight=False)


def quiet_libraries() -> None:
    """Silence progress bars and notices of libraries."""
    # Their progress bars and notices about heads that are about to be fitted would bury our own lines.
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def say(message: str) -> None:
    """Print a message, which may name classes, columns and files of strangers, on standard error."""
    console.print(printable(message), markup=False, soft_wrap=True)


def print_tables(tables: Iterable[Printed]) -> None:
    """Print tables, each with what is to be known about it."""
    for title, table, note in tables:
        print_table(title, table, note)


def print_table(title: str, table: Table, note: str = "") -> None:
    """Print rows of finished text, and a note below."""
    printed = rich.table.Table(title=one_line(title))
    for index, name in enumerate(table.head):
        printed.add_column(one_line(name), justify="left" if index < table.text_columns else "right")
    for row in table.rows:
        printed.add_row(*(Text(one_line(cell)) for cell in row))
    wide = Console(highlight=False, markup=False, width=max(110, console.width))  # else rich cuts columns at 80
    wide.print(printed)
    if note:
        wide.print(printable(note), "")


def print_evaluation(session: Session) -> None:
    """Print the figures of a finished evaluation."""
    from distill.pipeline.release import collect_evidence
    from distill.release.budgets import seeds_table, seeds_title
    from distill.release.sizes import bytes_table, efficiency_table, speed_table
    from distill.release.tables import arms_table, harness_table

    evidence = collect_evidence(session)
    examples, efficiency = evidence.evaluation["data"]["examples"], efficiency_table(evidence)
    titles = {f"{examples} held-out examples of {evidence.measured_on}": evidence}
    titles |= {f"{name} ({own.trained_on or 'not trained on'})": own for name, own in evidence.elsewhere.items()}
    for title, own in titles.items():
        arms = arms_table(own)
        rows = [(name, *row[1:]) for name, row in zip(own.arms, arms.rows, strict=True)]  # titles are too wide
        print_table(title, replace(arms, rows=rows))
        if title := seeds_title(own):
            print_table(title, seeds_table(own, short=True))
    if (harness := harness_table(evidence)).rows:
        print_table("lm-evaluation-harness, with one standard error", harness)
    if efficiency.rows:
        print_table("size and speed, measured in one run", efficiency)
        print_table("memory and throughput", speed_table(evidence))
        print_table("where the bytes are", bytes_table(evidence))


def tame_output() -> None:
    """Let nothing steer the terminal of what Python and libraries print: tracebacks, warnings and log records."""
    make, write = logging.getLogRecordFactory(), warnings.formatwarning

    def plain_record(*given: Any, **named: Any) -> logging.LogRecord:
        record = make(*given, **named)
        record.msg, record.args = printable(record.getMessage()), ()
        return record

    sys.excepthook = lambda *error: say("".join(traceback.format_exception(*error)).rstrip())
    threading.excepthook = lambda found: say("".join(traceback.format_exception(*found[:3])).rstrip())
    warnings.formatwarning = lambda *given, **named: printable(write(*given, **named))
    logging.setLogRecordFactory(plain_record)

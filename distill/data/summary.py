"""What became of the rows, in numbers: printed once, kept in evaluation.json and on the card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from distill.data.corpus import Examples
from distill.data.splits import Split
from distill.data.tasks.classes import list_names
from distill.data.tasks.task import Encoder
from distill.errors import InputError

FEW_TEST_EXAMPLES = 100
UNKNOWN_WARNED, UNKNOWN_REFUSED = 0.05, 0.5
"""Shares of unknown tokens: above the first a line says so, above the second the data are refused."""


def summarise(split: Split, encoder: Encoder, examples: Examples) -> dict[str, Any]:
    """Count rows, labels and tokens of one split, as JSON.

    Raises:
        InputError: Most of its tokens are unknown to the tokenizer.
    """
    unknown = encoder.unknown / max(1, encoder.tokens)
    if unknown > UNKNOWN_REFUSED:
        raise InputError(
            f"data: {unknown:.0%} of the tokens are unknown to the tokenizer, so the model cannot read these texts; "
            f"the teacher was made for another language or alphabet"
        )
    quantiles = np.quantile(examples.lengths, [0, 0.5, 0.9, 1], method="nearest").tolist()
    return {
        "rows": {name: count for name, count in split.counts.items() if count or name == "read"},
        "used": len(split.index),
        "labelled": int(split.labelled.sum()),
        "classes": {name: encoder.classes[name] for name in encoder.settled.classes},
        "examples": len(examples),
        "tokens": int(examples.lengths.sum()),
        "lengths": dict(zip(("shortest", "median", "90 %", "longest"), quantiles, strict=True)),
        "truncated": encoder.truncated,
        "truncated_share": round(encoder.truncated / max(1, encoder.examples), 4),
        "unknown_share": round(unknown, 4),
        "filled": round(float(examples.lengths.mean()) / encoder.spec.max_length, 4),
        "notes": dict(encoder.notes),
    }


def describe(summary: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Say in lines what became of the rows: all that was left out or cut, and what a careful person would doubt."""
    for name, own in summary.items():
        rows = own["rows"]
        reasons = [f"{count:,} {reason.replace('_', ' ')}" for reason, count in rows.items() if reason != "read"]
        left = f" ({', '.join(reasons)})" if reasons else ""
        read = f"{rows['read']:,} rows read{left}; " if "read" in rows else ""
        labelled = f", {own['labelled']:,} with a label" if own["labelled"] != own["used"] else ""
        lengths = f"{own['lengths']['median']:,} tokens at the median, {own['lengths']['longest']:,} at most"
        cut = f", {own['truncated']:,} cut" if own["truncated"] else ""
        yield f"  {name}: {read}{own['examples']:,} examples{labelled}; {lengths}{cut}"
        yield from (f"  {name}: {note}: {count:,}" for note, count in own["notes"].items())
        if own["unknown_share"] > UNKNOWN_WARNED:
            yield f"  {name}: {own['unknown_share']:.1%} of the tokens are unknown to the tokenizer"
    for name in ("train", "test"):
        for number, words in ((0, f"no {name} example of"), (1, f"only one {name} example of")):
            found = [f"{each!r}" for each, count in summary[name]["classes"].items() if count == number]
            if found:
                yield f"  {words} the class {list_names(found)}"
    if summary["test"]["examples"] < FEW_TEST_EXAMPLES:
        yield f"  only {summary['test']['examples']} test examples: differences of a few points are chance"

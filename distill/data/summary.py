"""What became of the rows, in numbers: printed once, kept in evaluation.json and on the card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.corpus import Examples
from distill.data.splits import Split
from distill.data.tasks.classes import folded
from distill.data.tasks.task import Encoder
from distill.errors import InputError
from distill.recipe.jsonrows import LISTED, quote_names
from distill.recipe.locate import is_path
from distill.recipe.schema import Source

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
    names = list_sources(split.rows.sources)
    origins = np.bincount(split.rows.origins[split.index], minlength=len(names)).tolist()
    return {
        "rows": {name: count for name, count in split.counts.items() if count or name == "read"},
        "sources": dict(zip(names, origins, strict=True)),
        "parts_of": split.rows.parts_of,
        "used": len(split.index),
        "labelled": int(split.labelled.sum()),
        "classes": {name: encoder.classes[name] for name in encoder.settled.classes},
        "examples": len(examples),
        "tokens": int(examples.lengths.sum()),
        "lengths": dict(zip(("shortest", "median", "90 %", "longest"), quantiles, strict=True)),
        "truncated": encoder.truncated,
        "truncated_share": round(encoder.truncated / max(1, encoder.examples), 4),
        "unknown_share": round(unknown, 4),
        "documents": int(examples.columns["documents"].lengths.sum()) if "documents" in examples.columns else None,
        "filled": round(float(examples.lengths.mean()) / encoder.spec.max_length, 4),
        "notes": dict(encoder.notes),
    }


def list_sources(sources: Sequence[Source]) -> list[str]:
    """Name sources without the folders that they lie in, each once."""
    names = [Path(source.source).name if is_path(source.source) else source.source for source in sources]
    return [name if names.count(name) == 1 else f"{number}: {name}" for number, name in enumerate(names, start=1)]


def describe(summary: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Say in lines what became of the rows: all that was left out or cut, and what a careful person would doubt."""
    for name, own in summary.items():
        yield f"  {name}: {describe_split(own)}"
        if len(own["sources"]) > 1:
            yield f"  {name}: rows used by source: {', '.join(f'{key} {n:,}' for key, n in own['sources'].items())}"
        yield from (f"  {name}: {note}: {count:,}" for note, count in own["notes"].items())
        if own["unknown_share"] > UNKNOWN_WARNED:
            yield f"  {name}: {own['unknown_share']:.1%} of the tokens are unknown to the tokenizer"
    if parts := summary["test"]["parts_of"]:
        what, its = ("1 document is", "its") if parts == 1 else (f"{parts} documents are", "their")
        before = (
            f", the part before {'it' if parts == 1 else 'them'} the validation split"
            if "validation" in summary
            else ""
        )
        yield f"  {what} split by place: {its} end is the test split{before}"
    yield from _describe_classes(summary)
    if summary["test"]["examples"] < FEW_TEST_EXAMPLES:
        yield f"  only {summary['test']['examples']} test examples: differences of a few points are chance"


def describe_split(own: Mapping[str, Any]) -> str:
    """Say in a line what was read, left out, used and cut."""
    rows = own["rows"]
    reasons = [f"{count:,} {reason.replace('_', ' ')}" for reason, count in rows.items() if reason != "read"]
    left = f" ({', '.join(reasons)})" if reasons else ""
    read = f"{rows['read']:,} rows read{left}; " if "read" in rows else f"{left.strip()} " if left else ""
    labelled = f", {own['labelled']:,} with a label" if own["labelled"] != own["used"] else ""
    lengths = f"{own['lengths']['median']:,} tokens at the median, {own['lengths']['longest']:,} at most"
    cut = f", {own['truncated']:,} cut" if own["truncated"] else ""
    if own["documents"] is not None:
        cut = f"; {own['documents']:,} documents, or pieces of them, fill the rows to {own['filled']:.1%}"
    return f"{read}{own['examples']:,} examples{labelled}; {lengths}{cut}"


def _describe_classes(summary: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Say how many examples the classes have, which have none, and which are easily taken for another."""
    for name in ("train", "test"):
        counts = summary[name]["classes"]
        if counts:
            some = ", ".join(f"{each} {count:,}" for each, count in [*counts.items()][:LISTED])
            yield f"  {name}: {some}{f', and {len(counts) - LISTED} more classes' if len(counts) > LISTED else ''}"
        for number, words in enumerate((f"no {name} example", f"only one {name} example")):
            if found := [each for each, count in counts.items() if count == number]:
                yield f"  {words} of the class {quote_names(found)}"
    alike: dict[str, list[str]] = {}
    for each in summary["train"]["classes"]:
        alike.setdefault(folded(each), []).append(each)
    for names in alike.values():
        if len(names) > 1:
            yield f"  the classes {quote_names(names)} differ in nothing but case, spaces or signs that look alike"

"""Tables of size and speed, one line for each measured form of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distill.release.evidence import Evidence
from distill.release.figures import get_in
from distill.release.table import Table
from distill.release.wording import format_count, format_megabytes, format_number, format_percent, format_ratio


def efficiency_table(evidence: Evidence) -> Table:
    """Tabulate size and speed of every measured form, one a line; empty when nothing was measured.

    In brackets its ratio to the teacher; of times with the range over the rounds.
    """
    return _lines_of(
        evidence,
        ("parameters", ("parameters",), "parameters", format_count),
        ("weights", ("bytes",), "bytes", format_megabytes),
        ("on disk", ("disk_bytes",), "disk_bytes", format_megabytes),
        ("FLOPs per example", ("flops_per_example",), "flops", lambda value: format_count(value, "kMGT")),
        ("latency p50, ms", ("latency_ms", "p50"), "latency", format_number),
        ("p90", ("latency_ms", "p90"), "", format_number),
        ("throughput, examples/s", ("throughput",), "throughput", format_number),
    )


def speed_table(evidence: Evidence) -> Table:
    """Tabulate memory, throughput by batch size, and writing, of every measured form."""
    sizes = get_in(evidence.evaluation, "efficiency", "protocol", "batch_sizes") or []
    writes = any("decode" in own for own in (get_in(evidence.evaluation, "efficiency", "models") or {}).values())
    throughput = [(f"examples/s, batch {size}", ("throughputs", str(size)), "", format_number) for size in sizes]
    speeds = [
        ("prefill, tokens/s", ("prefill",), "", format_number),
        ("decode, tokens/s", ("decode",), "", format_number),
    ]
    memory = ("peak memory", ("peak_bytes",), "peak_bytes", format_megabytes)
    return _lines_of(evidence, memory, *throughput, *(speeds if writes else []))


def bytes_table(evidence: Evidence) -> Table:
    """Tabulate where the bytes of the weights are, of every measured form that tells."""
    models = get_in(evidence.evaluation, "efficiency", "models") or {}
    found = {name: own["parts"] for name, own in models.items() if own.get("parts")}
    rows = []
    for name, parts in found.items():
        total = max(1, sum(parts.values()))
        rows.append((name, *(f"{format_megabytes(own)} ({format_percent(own / total)})" for own in parts.values())))
    return Table(("where the bytes are", *next(iter(found.values()), {})), rows)


def _lines_of(evidence: Evidence, *columns: tuple[str, tuple[str, ...], str, Callable[[Any], str]]) -> Table:
    """Write a line for each model; a column is its title, the path of the figure, its ratio and what writes it."""
    models, rows = get_in(evidence.evaluation, "efficiency", "models") or {}, []
    for model in models:
        cells = []
        for _, path, key, write in columns:
            ratio = evidence.ratio(key, model) if key else None
            share = "" if ratio is None else f" ({format_ratio(ratio).replace(' (', ', ').rstrip(')')})"
            cells.append(write(evidence.efficiency(model, *path)) + share)
        rows.append((model, *cells))
    return Table(("", *(title for title, *_ in columns)), rows)

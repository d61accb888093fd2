"""Write numbers and untrusted text for people: used by card, report, charts, `inspect` and the terminal. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MISSING = "\N{EN DASH}"
SHARES = ("accuracy", "agreement", "exact_match", "exact_text", "f1", "precision", "recall", "entity", "wer", "cer")
"""Metrics whose name starts like this are shares of 1 and are written as percentages."""

EXPLAINED = {
    "accuracy": "share of right answers",
    "f1_macro": "F1 of each class, averaged over classes",
    "f1_micro": "F1 over all decisions at once",
    "f1_relations": "F1 averaged over the classes that are relations",
    "matthews": "correlation of answers and truth, 0 is chance",
    "ece": "distance between confidence and share of right answers",
    "agreement": "share of answers that are the teacher's",
    "kl": "distance of the student's probabilities from the teacher's, in nats",
    "perplexity": "as if so many tokens were equally likely at each place",
    "loss": "mean of -log of the probability of what is right, in nats",
    "bits_per_byte": "bits that the model needs for a byte of text",
    "token_accuracy": "share of tokens predicted right",
    "masked_perplexity": "as if so many tokens were equally likely behind a mask",
    "masked_accuracy": "share of masked tokens predicted right",
    "entity_f1": "F1 of whole spans with their kind",
    "entity_precision": "share of the marked spans that are right",
    "entity_recall": "share of the true spans that are marked",
    "exact_match_answer": "share of answers that are the true text",
    "f1_answer": "overlap of words with the true answer",
    "mse": "mean squared error",
    "rmse": "root of the mean squared error",
    "pearson": "correlation of values",
    "spearman": "correlation of ranks",
    "mrr_at_10": "1 / rank of the right text among the first ten, averaged",
    "ndcg_at_10": "gain by rank among the first ten, 1 is best",
    "recall_at_10": "share of right texts among the first ten",
    "cosine_to_teacher": "cosine between the student's vector of a text and the teacher's",
    "neighbours_kept": "share of the ten nearest texts that are the teacher's",
    "teacher_mse": "mean squared distance from the teacher's values",
    "rouge_l": "longest common run of words",
    "rouge_1": "common words",
    "rouge_2": "common pairs of words",
    "chrf": "common runs of characters",
    "exact_text": "share of texts written exactly",
    "wer": "words to change for each true word",
    "cer": "characters to change for each true character",
}
"""Metric -> half a sentence about it."""


def as_number(value: Any) -> float | None:
    """Convert to a float; None for what is not a number that can be written or drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and abs(value) < 1e100 else None


def printable(value: Any) -> str:
    """Strip control, format and surrogate characters, which steer a terminal and break XML; line breaks stay."""
    kept = (" " if letter.isspace() and letter != "\n" else letter for letter in str(value))
    return "".join(letter for letter in kept if letter == "\n" or letter.isprintable())


def one_line(value: Any) -> str:
    """Strip what `printable` strips and join the lines: text that stays in its cell of a table."""
    return " ".join(printable(value).split())


def format_number(value: Any) -> str:
    """Write four significant digits, and all digits before the decimal point."""
    known = as_number(value)
    if known is None:
        return MISSING
    return f"{known:,.0f}" if 1e3 <= abs(known) < 1e15 else f"{known:.4g}"


def format_percent(value: Any) -> str:
    """Write a share of 1 as a percentage."""
    known = as_number(value)
    return MISSING if known is None else f"{100 * known:.1f} %"


def format_count(value: Any, units: str = "kMBT") -> str:
    """Write a large count with a unit: 22.7 M; `kMGT` gives the units of FLOPs."""
    known = as_number(value)
    if known is None:
        return MISSING
    for power, unit in reversed(list(enumerate(units, start=1))):
        if abs(known) >= 1000**power:
            return f"{known / 1000**power:.1f} {unit}"
    return f"{known:.4g}"


def format_megabytes(value: Any) -> str:
    """Write bytes as MB (10⁶)."""
    known = as_number(value)
    return MISSING if known is None else f"{known / 1e6:.1f} MB"


def format_ratio(value: Any) -> str:
    """Write a ratio, with its range when it was measured several times ({median, min, max})."""
    if isinstance(value, dict):
        low, high = as_number(value.get("min")), as_number(value.get("max"))
        span = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
        return format_ratio(value.get("median")) + span
    known = as_number(value)
    return MISSING if known is None else f"{known:.2f}x"


def is_share(metric: str) -> bool:
    """Tell whether a metric is written as a percentage."""
    return metric.startswith(SHARES)


def format_metric(metric: str, value: Any) -> str:
    """Write the value of a metric."""
    return format_percent(value) if is_share(metric) else format_number(value)


def format_difference(metric: str, value: float) -> str:
    """Write the distance between two values of a metric."""
    return f"{100 * value:.1f} points" if is_share(metric) else format_number(value)


def format_interval(metric: str, interval: Mapping[str, Any]) -> str:
    """Write the two ends of an interval behind its figure, with a space in front; empty where it has none."""
    ends = [as_number(interval.get(end)) for end in ("low", "high")]
    if None in ends:
        return ""
    low, high = (f"{100 * end:.1f}" if is_share(metric) else format_number(end) for end in ends if end is not None)
    return f" [{low}, {high}]"


def format_paired(metric: str, pair: Mapping[str, Any]) -> str:
    """Write a difference of two values of a metric with its interval; empty where there is none."""
    value = as_number(pair.get("value"))
    if value is None:
        return ""
    return format_difference(metric, value) + format_interval(metric, pair)


def format_size(value: Any) -> str:
    """Write bytes as GB (10⁹), or as MB where they are fewer."""
    known = as_number(value)
    if known is None:
        return MISSING
    return f"{known / 1e9:.2f} GB" if known >= 1e9 else f"{known / 1e6:.1f} MB"


def format_seconds(value: Any) -> str:
    """Write a time in the largest unit of which there is one, to two digits and more."""
    known = as_number(value)
    if known is None:
        return MISSING
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if known >= seconds:
            return f"{known / seconds:.1f} {unit}"
    return f"{known:.1f} s"

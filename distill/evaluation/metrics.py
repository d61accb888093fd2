"""Metrics by name, and how they are computed from the predictions of a split.

`distill.evaluation.formulas` says what the columns are. A recipe may name a function of its own,
`package.module:function`, written as those are.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from distill.errors import InputError
from distill.evaluation import answers, formulas
from distill.evaluation.formulas import Column
from distill.registry import find

Function = Callable[..., float]


def columns_of(function: Function) -> tuple[str, ...]:
    """List the columns that a metric reads: its positional parameters (keyword-only ones are options).

    >>> columns_of(formulas.perplexity)
    ('nll', 'tokens')
    """
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(function).parameters.items() if p.kind in positional)


def compute(names: Sequence[str], columns: Mapping[str, Column]) -> dict[str, float]:
    """Compute the named metrics over all examples (of all ranks: gather first); a column that none reads is ignored.

    Values are plain floats, not always finite: an overflowing perplexity is inf, a mean over no tokens nan.

    Raises:
        InputError: An unknown metric, or a column that is missing, empty, or as long as no other.
    """
    functions = {name: find_metric(name, columns) for name in names}
    read = {column: columns[column] for function in functions.values() for column in columns_of(function)}
    lengths = {column: len(values) for column, values in read.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise InputError(f"metrics need columns with one row per example, at least one: the rows are {lengths}")
    if not names:
        return {}
    with tempfile.TemporaryDirectory() as folder:  # evaluate would keep files in the user's cache
        metric = metric_class(functions, read)(keep_in_memory=True, cache_dir=folder)
        return dict(metric.compute(**read))


def measurable(names: Sequence[str], columns: Collection[str]) -> list[str]:
    """Choose the metrics whose columns are there: some are read from what a model writes, which takes long."""
    return [name for name in names if set(columns_of(find(METRICS, name, "metric"))) <= set(columns)]


def find_metric(name: str, columns: Collection[str]) -> Function:
    """Find the function of a metric. Raises InputError when there is none, or it reads other columns than there are."""
    function: Function = find(METRICS, name, "metric")
    wanted = columns_of(function)
    if not wanted:
        raise InputError(f"metric {name!r} has no positional parameter; each one names a column, e.g. predictions")
    if missing := [column for column in wanted if column not in columns]:
        raise InputError(
            f"metric {name!r} needs the columns {', '.join(wanted)}; there is no {', '.join(missing)} "
            f"(there are: {', '.join(sorted(columns)) or 'none'})"
        )
    return function


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"evaluation.metrics: {name} returned {value!r}, not a number") from error


def metric_class(functions: Mapping[str, Function], columns: Mapping[str, Column]) -> Any:
    """Wrap metric functions, by the name of their result, in an `evaluate.Metric` that reads these columns.

    It lives in this package because `evaluate.load` needs the hub and runs a file of that name in the working folder.
    """
    import datasets
    import evaluate  # takes seconds

    types = {"b": "int64", "i": "int64", "u": "int64", "f": "float64", "U": "string"}  # by kind of a numpy type
    values = {column: datasets.Value(types[own.dtype.kind]) for column, own in columns.items()}
    features = datasets.Features(
        {name: datasets.List(value) if columns[name].ndim > 1 else value for name, value in values.items()}
    )

    class FunctionMetrics(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
        def _info(self) -> Any:
            about = {"description": ", ".join(functions), "citation": "", "inputs_description": ""}
            return evaluate.MetricInfo(features=features, **about)

        def _compute(self, **rows: Any) -> dict[str, float]:
            # They arrive as lists: the "numpy" format of datasets would round float64 to float32.
            arrays = {column: np.asarray(values) for column, values in rows.items()}
            return {
                name: _number(name, function(*(arrays[column] for column in columns_of(function))))
                for name, function in functions.items()
            }

    return FunctionMetrics


METRICS: dict[str, Function] = {
    "accuracy": formulas.accuracy,
    "f1_macro": formulas.f1_macro,
    "agreement": formulas.agreement,
    "perplexity": formulas.perplexity,
    "token_accuracy": formulas.token_accuracy,
    "kl": formulas.kl,
    "loss": formulas.loss,
    "exact_match_answer": answers.exact_match_answer,
    "f1_answer": answers.f1_answer,
    "f1_relations": formulas.f1_relations,
    "f1_micro": formulas.f1_micro,
    "matthews": formulas.matthews,
    "ece": formulas.ece,
    "mse": formulas.mse,
    "rmse": formulas.rmse,
    "pearson": formulas.pearson,
    "spearman": formulas.spearman,
    "teacher_mse": formulas.teacher_mse,
    "entity_f1": formulas.entity_f1,
    "entity_precision": formulas.entity_precision,
    "entity_recall": formulas.entity_recall,
    "bits_per_byte": formulas.bits_per_byte,
    # The same formulas, over masked tokens: another question, so not to be compared with those of causal models.
    "masked_perplexity": formulas.perplexity,
    "masked_accuracy": formulas.token_accuracy,
    "mrr_at_10": formulas.mrr_at_10,
    "ndcg_at_10": formulas.ndcg_at_10,
    "recall_at_10": formulas.recall_at_10,
    "cosine_to_teacher": formulas.cosine_to_teacher,
    "neighbours_kept": formulas.neighbours_kept,
    "rouge_l": formulas.rouge_l,
    "rouge_1": formulas.rouge_1,
    "rouge_2": formulas.rouge_2,
    "chrf": formulas.chrf,
    "exact_text": formulas.exact_text,
    "wer": formulas.wer,
    "cer": formulas.cer,
}

LOWER_IS_BETTER = (
    "perplexity", "kl", "loss", "ece", "mse", "rmse", "teacher_mse", "bits_per_byte", "masked_perplexity", "wer", "cer",
)  # fmt: skip

UNBOUNDED = (
    *(name for name in LOWER_IS_BETTER if name not in ("ece", "wer", "cer")),
    "pearson",
    "spearman",
    "matthews",
)
"""Metrics that are no shares of 1; `cosine_to_teacher` is below 0 at most for a broken student."""


def is_share(name: str) -> bool:
    """Tell whether a metric is a share of 1, which has an interval even where all rows agree; not of the user's own."""
    return name in METRICS and name not in UNBOUNDED


def higher_is_better(name: str) -> bool:
    """Tell the direction of a metric; of the user's own, more is better."""
    return name not in LOWER_IS_BETTER

"""Metrics: one plain function per row of the table at the foot; its positional parameters name the columns it reads.

A column is a 1-D array with one entry per example or, for language models, per text or token:

    predictions, references, teacher_predictions   class (integer, or its name)
    nll, tokens, correct     sum of negative log-likelihoods in nats, scored tokens, tokens predicted right
    kl_sum, positions        sum of KL(teacher || student) in nats, compared positions

The metrics of language models are ratios of totals: a mean of per-batch means would weigh short texts too much.
A recipe may name a function of its own, `package.module:function`, written the same way.
"""

from __future__ import annotations

import inspect
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distill.errors import InputError
from distill.registry import find

# numpy and evaluate are imported where they are used, so that a recipe's metric names are checked at once: they take
# 0.2 s and several seconds.
if TYPE_CHECKING:
    import numpy as np

    Column = np.ndarray[tuple[int], np.dtype[Any]]

Function = Callable[..., float]


def accuracy(predictions: Column, references: Column) -> float:
    """Share of the examples whose predicted class is the true one."""
    return float((predictions == references).mean())


def f1_macro(predictions: Column, references: Column) -> float:
    """Unweighted mean over classes of F1 = 2 TP / (2 TP + FP + FN), as scikit-learn's `average="macro"`.

    The classes are those of the references and of the predictions together: a class that is predicted and never true
    (or true and never predicted) counts as 0. Its denominator is the times it is true plus the times it is predicted,
    so it is never 0.
    """
    import numpy as np

    classes, codes = np.unique(np.concatenate([predictions, references]), return_inverse=True)
    predicted, true = np.split(codes, 2)
    hits = np.bincount(true[predicted == true], minlength=len(classes))
    return float((2 * hits / np.bincount(codes, minlength=len(classes))).mean())


def agreement(predictions: Column, teacher_predictions: Column) -> float:
    """Share of the examples where student and teacher predict the same class, right or wrong."""
    return float((predictions == teacher_predictions).mean())


def loss(nll: Column, tokens: Column) -> float:
    """Mean negative log-likelihood per token, in nats; nan without any token."""
    return _per(nll, tokens)


def perplexity(nll: Column, tokens: Column) -> float:
    """exp(sum of nll / sum of tokens); inf where that overflows, nan without any token."""
    try:
        return math.exp(loss(nll, tokens))
    except OverflowError:
        return math.inf


def token_accuracy(correct: Column, tokens: Column) -> float:
    """Share of the scored tokens that are predicted right; nan without any token."""
    return _per(correct, tokens)


def kl(kl_sum: Column, positions: Column) -> float:
    """Mean KL(teacher || student) per position, in nats; nan without any position."""
    return _per(kl_sum, positions)


def _per(amount: Column, count: Column) -> float:
    """Ratio of two totals."""
    total = float(count.sum())
    return float(amount.sum()) / total if total else math.nan


def columns_of(function: Function) -> tuple[str, ...]:
    """Names of the columns that a metric reads: its positional parameters (keyword-only ones are options).

    >>> columns_of(perplexity)
    ('nll', 'tokens')
    """
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(function).parameters.items() if p.kind in positional)


def compute(names: Sequence[str], columns: Mapping[str, Column]) -> dict[str, float]:
    """The named metrics over all examples, on one process (gather first); columns that no metric reads are ignored.

    Values are plain floats, not always finite: an overflowing perplexity is inf, a mean over no tokens nan.

    Raises:
        InputError: an unknown metric, or a column that is missing, empty, not 1-D or as long as the metric's others.
    """
    import numpy as np

    functions: dict[str, Function] = {name: find(METRICS, name, "metric") for name in names}
    read: dict[str, Column] = {}
    for name, function in functions.items():
        read |= _checked(name, function, {column: np.asarray(values) for column, values in columns.items()})
    import evaluate

    # evaluate makes a folder per metric in its cache, also for metrics that keep everything in memory.
    with tempfile.TemporaryDirectory() as folder:
        metrics = {
            name: metric_class(name, function, read)(keep_in_memory=True, cache_dir=folder)
            for name, function in functions.items()
        }
        scores = evaluate.combine(metrics).compute(**read)
    return {name: float(scores[name]) for name in functions}


def metric_class(name: str, function: Function, columns: Mapping[str, Column]) -> Any:
    """The `evaluate.Metric` subclass around a metric function, whose result it calls `name`.

    It lives in this package because `evaluate.load` needs the hub and runs a file of that name in the working folder.
    `columns` give the types; `evaluate` needs them before the first example.
    """
    import datasets
    import evaluate
    import numpy as np

    features = {column: datasets.Value(_ARROW_TYPES[columns[column].dtype.kind]) for column in columns_of(function)}

    class FunctionMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
        def _info(self) -> Any:
            return evaluate.MetricInfo(
                description=inspect.getdoc(function) or name,
                citation="",
                inputs_description="",
                features=datasets.Features(features),
            )

        def _compute(self, **batch: Any) -> dict[str, float]:
            # The columns of other metrics come along under `combine`. They arrive as lists: the "numpy" format of
            # datasets would round float64 to float32.
            return {name: float(function(*(np.asarray(batch[column]) for column in features)))}

    return FunctionMetric


_ARROW_TYPES = {"b": "int64", "i": "int64", "u": "int64", "f": "float64", "U": "string"}
"""Kind of a numpy type -> type in which `evaluate` keeps it."""


def _checked(name: str, function: Function, columns: Mapping[str, Column]) -> dict[str, Column]:
    """The columns that one metric reads."""
    wanted = columns_of(function)
    if not wanted:
        raise InputError(f"metric {name!r} has no positional parameter; each one names a column, e.g. predictions")
    if missing := [column for column in wanted if column not in columns]:
        raise InputError(
            f"metric {name!r} needs the columns {', '.join(wanted)}; there is no {', '.join(missing)} "
            f"(there are: {', '.join(sorted(columns)) or 'none'})"
        )
    own = {column: columns[column] for column in wanted}
    for column, values in own.items():
        if values.ndim != 1 or values.dtype.kind not in _ARROW_TYPES:
            got = f"shape {values.shape} of {values.dtype}"
            raise InputError(f"metric {name!r}: column {column} must be one number or text per example, got {got}")
    lengths = {column: len(values) for column, values in own.items()}
    if set(lengths.values()) == {0}:
        raise InputError(f"metric {name!r}: there are no examples to measure (empty {', '.join(wanted)})")
    if len(set(lengths.values())) > 1:
        raise InputError(f"metric {name!r}: its columns have different lengths: {lengths}")
    return own


METRICS: dict[str, Function] = {
    "accuracy": accuracy,
    "f1_macro": f1_macro,
    "agreement": agreement,
    "perplexity": perplexity,
    "token_accuracy": token_accuracy,
    "kl": kl,
    "loss": loss,
}

HIGHER_IS_BETTER: dict[str, bool] = {
    "accuracy": True,
    "f1_macro": True,
    "agreement": True,
    "perplexity": False,
    "token_accuracy": True,
    "kl": False,
    "loss": False,
}
"""Direction of each metric of the table."""

"""Classes, sets of classes or a number for each text, or for each pair of texts."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from distill.data.tasks.classes import check_count, class_numbers, doubts_about, order_classes
from distill.data.tasks.task import TEXT, Column, Encoder, Features, Ragged, Seeds, Settled, Task, Values
from distill.errors import InputError
from distill.models.forward import UNLABELLED, Batch
from distill.recipe.jsonrows import list_names
from distill.recipe.schema import Data

SIGNED = re.compile(r"[+-]?\d+", re.ASCII)
DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?", re.ASCII)
"""Texts that are numbers: a decimal number has a point or an exponent. Whole numbers may also name classes."""
FOREIGN_LIST = re.compile(r"\[\s*('.*'|[01][\s,.01]*)\s*\]", re.DOTALL)
"""A list as Python, pandas and numpy write it into a CSV file."""
PROBLEM_TYPES = {
    "sequence": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
"""Kind of predictions -> what transformers calls it in a config."""
METRICS = {
    "sequence": ("accuracy", "f1_macro", "loss"),
    "multi_label": ("f1_micro", "f1_macro", "accuracy", "loss"),
    "regression": ("pearson", "spearman", "mse"),
}
"""Kind of predictions -> metrics that are measured unless the recipe says otherwise."""


def read_label(value: Any) -> Any:
    """Accept a class (text, a whole number, true or false), a number, or a list of classes; empty: no label.

    A list may be written as JSON in a text, since a CSV file has nothing else. It becomes a set: sorted.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            if FOREIGN_LIST.fullmatch(value.strip()):
                raise ValueError('is a list, but not one as JSON: write it as ["a", "b"]') from None
            return value  # a class whose name starts with a bracket
    if isinstance(value, list):
        return _read_classes(value)
    if not isinstance(value, str | int | float):
        raise ValueError("is no label: neither text, a number nor a list of classes")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("is no finite number; leave it empty where there is no label")
    return value


def _read_classes(value: list[Any]) -> list[str] | list[int]:
    if not all(isinstance(item, str | int) for item in value) or len({type(item) for item in value}) > 1:
        raise ValueError("is no list of classes: all must be text, or all whole numbers")
    if not all(str(item).strip() for item in value):
        raise ValueError("has a class without a name; an empty list says that there is none")
    if len(set(value)) < len(value):
        raise ValueError("names a class twice; a list is of classes, not a 0 or 1 for each")
    return sorted(value)


class Classification(Task):
    """The labels decide: text or whole numbers are classes, lists are sets of classes, decimal numbers are values."""

    name = "classification"
    auto_class = "AutoModelForSequenceClassification"
    head = "sequence"
    columns: ClassVar = {"text": TEXT, "pair": TEXT, "label": Column(read_label, answer=True)}

    def metrics_for(self, head: str) -> Sequence[str]:
        """Choose the metrics that a kind of predictions is measured by, unless the recipe says otherwise."""
        return METRICS[head]

    def settle(self, labels: Mapping[str, Counter[str]], spec: Data) -> Settled:
        """Tell classes, sets of classes and values by the types of the labels."""
        counts: Counter[str] = sum(labels.values(), Counter())
        values = [json.loads(text) for text in counts]
        head = head_of(values, spec.classes is not None)
        if head == "regression":
            numbers = [float(value) for value in values]
            return Settled("regression", about=f"{_range(numbers)}, so this is a regression")
        each = [item for value in values for item in (value if head == "multi_label" else [value])]
        classes = order_classes(each, spec.classes)
        if head == "multi_label" and len(counts) == 1 and classes:
            raise InputError(f"data: every row has {list_names(classes)}; a list is of classes, not a 0 or 1 for each")
        check_count(classes, counts.total(), spec.classes)
        of = "sets of " if head == "multi_label" else ""
        return Settled(head, classes, f"{of}{len(classes)} classes{'' if spec.classes else doubts_about(classes)}")

    def model_settings(self, settled: Settled) -> dict[str, Any]:
        """Return the kind of labels as transformers names it, and the one output of a regression."""
        one = {"num_labels": 1} if settled.head == "regression" else {}
        return {"problem_type": PROBLEM_TYPES[settled.head], **one}

    def encode(self, rows: Values, encoder: Encoder) -> Features:
        """Encode texts or pairs, and turn labels into numbers: of the class, a 0 or 1 for each class, or their own."""
        given = rows["label"]
        labelled = [label is not None for label in given]
        found = encoder(rows["text"], rows.get("pair"))
        classes, head = encoder.settled.classes, encoder.settled.head
        labels: list[Any]
        if head == "regression":
            labels = [float(UNLABELLED) if label is None else float(label) for label in given]
        else:
            number_of = class_numbers(classes)
            sets = [[] if label is None else label if isinstance(label, list) else [label] for label in given]
            numbers = [[number_of(name) for name in names] for names in sets]
            encoder.classes.update(classes[number] for each in numbers for number in each)
            if head == "multi_label":
                labels = [_indicators(each, len(classes), has) for each, has in zip(numbers, labelled, strict=True)]
            else:
                labels = [each[0] if each else UNLABELLED for each in numbers]
        return {**found, "label": labels, "labelled": labelled}

    def collate(self, examples: Mapping[str, Any], padding: int, seeds: Seeds) -> Batch:
        """Keep sets as wide as there are classes, whatever lengths texts are padded to."""
        if isinstance(sets := examples["label"], Ragged):
            examples = {**examples, "label": replace(sets, sizes=())}
        return super().collate(examples, padding, seeds)


def head_of(values: Collection[Any], stated: bool) -> str:
    """Tell the kind of predictions by the labels: those of one data set are all of one kind.

    Args:
        values: The labels.
        stated: The recipe lists the classes, so that numbers are classes as well.

    Raises:
        InputError: They are of several kinds.
    """
    kinds = {_kind(value): value for value in values}
    if set(kinds) == {"lists"}:
        return "multi_label"
    if stated and "lists" not in kinds:
        return "sequence"
    for decimal, whole in (("decimal numbers", "whole numbers"), ("decimal numbers as text", "whole numbers as text")):
        if decimal in kinds and kinds.keys() <= {decimal, whole}:
            return "regression"
    if len(kinds) < 2 or kinds.keys() <= {"text", "whole numbers as text"}:
        return "sequence"
    listed = " and ".join(f"{kind} (e.g. {value!r})" for kind, value in sorted(kinds.items()))
    raise InputError(
        f"data: the labels are of several kinds: {listed}; write them alike, and leave the label empty where there is "
        f"none; or list all in data.classes, if these are names of classes"
    )


def _kind(value: Any) -> str:
    if isinstance(value, str):
        text = value.strip()
        kind = "decimal numbers" if DECIMAL.fullmatch(text) else "whole numbers" if SIGNED.fullmatch(text) else ""
        return f"{kind} as text" if kind else "text"
    kinds = {list: "lists", bool: "true or false", int: "whole numbers", float: "decimal numbers"}
    return kinds[type(value)]


def _range(numbers: Sequence[float]) -> str:
    lowest, highest = min(numbers), max(numbers)
    if lowest == highest:
        raise InputError(f"data: every label is {lowest:g}, so there is nothing to learn")
    if np.float32(UNLABELLED) in np.array(numbers, dtype=np.float32):
        raise InputError(f"data: the label {UNLABELLED} stands for rows without a label; scale or shift the numbers")
    whole = ", all whole (data.classes would make classes of them)" if all(map(float.is_integer, numbers)) else ""
    return f"numbers from {lowest:g} to {highest:g}{whole}"


def _indicators(numbers: Sequence[int], classes: int, labelled: bool) -> list[int]:
    """Write a set of classes as 0 and 1 for each class; without a label `UNLABELLED` for each."""
    return [int(number in numbers) if labelled else UNLABELLED for number in range(classes)]

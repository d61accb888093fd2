"""Classes, several classes or a number for each text, or for each pair of texts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from distill.data.tasks.task import TEXT, Column, Encoder, Features, Seeds, Settled, Task, Values
from distill.errors import InputError
from distill.models.forward import UNLABELLED, Batch

CROWDED = 0.5
"""Share of the labelled rows above which the number of classes says that labels are no classes."""


def read_label(value: Any) -> Any:
    """Accept a class (text, a whole number, true or false), a number, or a list of classes; empty: no label."""
    if value is None or value == "":
        return None
    kinds = {type(item) for item in value} if isinstance(value, list) else {type(value)}
    if not kinds <= {str, int, bool} and (isinstance(value, list) or kinds != {float}):
        raise ValueError("is no label: neither text, a number nor a list of classes")
    return value


def parse_number(text: str) -> float | None:
    """Read a decimal number from text; None where it is none, or only digits, which may name a class."""
    try:
        return float(text) if any(mark in text for mark in ".eE") and text[-1].isdigit() else None
    except ValueError:
        return None


class Classification(Task):
    """The labels decide: text or whole numbers are classes, lists are sets of classes, decimal numbers are values."""

    name = "classification"
    auto_class = "AutoModelForSequenceClassification"
    head = "sequence"
    columns: ClassVar = {"text": TEXT, "pair": TEXT, "label": Column(read_label, answer=True)}
    metrics = ("accuracy", "f1_macro", "loss")

    def settle(self, labels: Mapping[str, Counter[str]]) -> Settled:
        """Tell classes, sets of classes and values by the types of the labels."""
        counts: Counter[str] = sum(labels.values(), Counter())
        values = {text: json.loads(text) for text in counts}
        kinds = {"a list" if isinstance(value, list) else _kind(value) for value in values.values()}
        if "decimal numbers" in kinds and kinds <= {"decimal numbers", "whole numbers"}:
            raise InputError("data: the labels are numbers, and this task has classes")
        if len(kinds) > 1:
            raise InputError(f"data: the labels are of several kinds: {', '.join(sorted(kinds))}")
        names = tuple(sorted({str(value) for value in values.values()}))
        if len(names) < 2:
            raise InputError(f"data: classification needs two or more classes, found {list(names)}")
        if len(names) > max(2, CROWDED * counts.total()):
            raise InputError(
                f"data: {len(names)} classes for {counts.total()} labels, e.g. {', '.join(names[:3])}: these are no "
                f"classes; write decimal numbers as such, and check data.columns"
            )
        return Settled("sequence", names)

    def encode(self, rows: Values, encoder: Encoder) -> Features:
        """Encode texts or pairs, and look labels up among the classes."""
        index = {name: number for number, name in enumerate(encoder.settled.classes)}
        labels = [UNLABELLED if label is None else index[str(label)] for label in rows["label"]]
        labelled = [label is not None for label in rows["label"]]
        return {**encoder(rows["text"], rows.get("pair")), "label": labels, "labelled": labelled}

    def collate(self, examples: Mapping[str, Any], padding: int, seeds: Seeds) -> Batch:
        """Add one label per example."""
        labels = torch.from_numpy(np.asarray(examples["label"]))
        return {**super().collate(examples, padding, seeds), "labels": labels}


def _kind(value: Any) -> str:
    if isinstance(value, float) or (isinstance(value, str) and parse_number(value) is not None):
        return "decimal numbers"
    return {int: "whole numbers", bool: "true or false"}.get(type(value), "text")

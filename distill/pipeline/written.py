"""The shapes of the JSON files that one stage writes and another, or another verb, reads back.

They hold what is read without asking whether it is there; a file may say more.
"""

from __future__ import annotations

from typing import Any, NotRequired

from typing_extensions import TypedDict

Figures = dict[str, float | None]
"""Metric -> its value."""
Named = dict[str, dict[str, Any]]


class Stamp(TypedDict):
    """`stages/NAME.json`."""

    made_from: str
    inputs: dict[str, Any]
    results: dict[str, str]
    seconds: float
    peak_bytes: int | None


class Tried(TypedDict):
    """What a control learned with one of several settings."""

    metrics: Figures
    tokens: int | None


class Search(TypedDict):
    """How the settings of a control were chosen: `search.json`."""

    by: str
    split: str
    tried: list[Tried]
    chosen: int


class MeasuredArm(TypedDict):
    """A row of the evaluation."""

    name: str
    metrics: Figures
    title: NotRequired[str]
    steps: NotRequired[int]
    lr: NotRequired[float | None]
    tokens: NotRequired[int | None]
    search: NotRequired[Search | None]
    intervals: NotRequired[Named]


class Difference(TypedDict):
    """The distilled student less another arm."""

    against: str
    metrics: Named


class Classes(TypedDict):
    """Figures of every class, and pairs of classes with their counts, by arm."""

    classes: dict[str, Named]
    confusion: dict[str, list[tuple[str, str, int]]]


class MeasuredSet(TypedDict):
    """The arms on one set of rows."""

    arms: list[MeasuredArm]
    differences: NotRequired[list[Difference]]
    per_class: NotRequired[Classes | None]
    trained_on: NotRequired[dict[str, int] | None]


class Split(TypedDict):
    """What became of the rows of a split."""

    rows: dict[str, int]
    classes: dict[str, int]
    labelled: int
    examples: int
    tokens: int
    lengths: dict[str, int]
    truncated: int
    truncated_share: float
    unknown_share: float


class Data(TypedDict):
    """The data that were measured on."""

    source: str
    split: str
    examples: int
    train_examples: int
    fingerprint: str
    summary: NotRequired[dict[str, Split]]


class Seeds(TypedDict):
    """The same over several seeds."""

    seeds: list[int]
    arms: dict[str, Named]
    sets: dict[str, dict[str, Named]]


class Harness(TypedDict):
    """Figures of lm-evaluation-harness."""

    lm_eval: str
    arms: dict[str, list[dict[str, Any]]]


class Speed(TypedDict):
    """Size and speed."""

    protocol: dict[str, Any]
    models: Named


class Evaluation(MeasuredSet):
    """`evaluation.json`."""

    data: Data
    metrics: list[str]
    primary: str
    higher_is_better: dict[str, bool]
    sets: NotRequired[dict[str, MeasuredSet]]
    rivals: NotRequired[dict[str, str]]
    not_run: NotRequired[dict[str, str]]
    drawn: NotRequired[dict[str, Any] | None]
    efficiency: NotRequired[Speed | None]
    seeds: NotRequired[Seeds | None]
    harness: NotRequired[Harness | None]
    sparsity: NotRequired[dict[str, Any] | None]


class RepairStep(TypedDict):
    """One step of the repair."""

    name: str
    notes: list[str]
    held_out: Figures


class Examined(TypedDict):
    """`teacher.json`."""

    split: str
    examples: int
    metrics: Figures
    weakness: str


class Repair(TypedDict):
    """`repair.json`."""

    held_out: dict[str, Any]
    steps: list[RepairStep]


class Cached(TypedDict):
    """`teacher_cache.json`."""

    cache: str
    files: list[str]

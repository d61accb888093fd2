"""The rows of each split that are used: cleaned, split, and every other row accounted for.

What becomes of a row depends on the hashes of its texts, never on its place in a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from distill.data.rows import BLOCK, Rows
from distill.errors import InputError
from distill.recipe.data import SET
from distill.recipe.schema import Data

TRAINED_ON = "also_in_training_kept"
"""Count of the rows of a set that are among those of training, by the hash of what the model is given."""


@dataclass
class Split:
    """The rows of one split that are used, and the others by reason."""

    name: str
    rows: Rows
    index: np.ndarray
    """int64 [m] rows, in the order of their keys; a row may stand there several times."""
    labelled: np.ndarray = field(default_factory=lambda: np.ones(0, dtype=bool))
    """bool [m], the row keeps its label."""
    counts: dict[str, int] = field(default_factory=dict)
    """Rows read, and those left out by reason."""

    @property
    def keys(self) -> np.ndarray:
        """Keys of the rows that are left, ascending."""
        found: np.ndarray = self.rows.keys[self.index]
        return found

    def count_labels(self, columns: Collection[str]) -> Counter[str]:
        """Count the labels, as JSON, in some columns."""
        found: Counter[str] = Counter()
        for column in set(columns) & self.rows.file.columns.keys():
            for start in range(0, len(self.index), BLOCK):
                found.update(self.rows.file.columns[column].take(self.index[start : start + BLOCK]))  # type: ignore[arg-type]
        del found["null"]
        return found

    def keep(self, kept: np.ndarray, reason: str) -> None:
        """Leave out all rows but those that are marked, and count them."""
        self.counts[reason] = self.counts.get(reason, 0) + int((~kept).sum())
        self.index = self.index[kept]

    def resolve_contradictions(self, rule: str, key: str) -> None:
        """Settle groups of rows with equal inputs and different labels. Raises InputError where they are refused."""
        if rule == "keep":
            return
        keys, answers = self.keys, self.rows.answers[self.index]
        _, starts, sizes = np.unique(keys, return_index=True, return_counts=True)
        kept = np.ones(len(keys), dtype=bool)
        places: list[str] = []
        groups = 0
        for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
            group = answers[start : start + size]
            given = group[group != 0]
            if not len(given) or (given == given[0]).all():
                continue
            groups += 1
            if not places:
                other = int(np.flatnonzero((group != 0) & (group != given[0]))[0])
                places = self.rows.file.take(self.index[[start, start + other]])["place"]
            winner = Counter(given.tolist()).most_common(1)[0][0] if rule == "majority" else given[0]
            kept[start : start + size] = False if rule == "drop" else group == winner
        if groups and rule == "refuse":
            raise InputError(
                f"{key}: {groups} texts stand there with different labels, e.g. {' and '.join(places)}; "
                f"mend them, or write data.contradictions: first, majority, drop or keep"
            )
        self.keep(kept, "contradicting")

    def drop_equal(self, contradicting: bool) -> None:
        """Keep the first of rows that are equal in everything, one with a label before one without.

        Where rows may contradict each other, those with equal inputs and different labels all stay.
        """
        keys, kept = self.keys, np.zeros(len(self.index), dtype=bool)
        marks = np.rec.fromarrays([keys, self.rows.answers[self.index]]) if contradicting else keys
        kept[np.unique(marks, return_index=True)[1]] = True
        self.keep(kept, "equal")

    def count_equal(self) -> None:
        """Count rows that are equal, and keep them: a test of the user's own stays as it is."""
        keys = self.keys
        self.counts["equal_kept"] = int((keys[1:] == keys[:-1]).sum())

    def drop_those_of(self, other: Split) -> None:
        """Leave out rows whose input is in another split."""
        self.keep(~np.isin(self.keys, other.keys), f"also_in_{other.name}")

    def take(self, name: str, share: float) -> Split:
        """Move the share of rows with the smallest draws to a new split of that name."""
        chosen = self.rows.draws[name][self.index] < share
        taken = Split(name, self.rows, self.index[chosen])
        self.index = self.index[~chosen]
        return taken

    def drop_unlabelled(self) -> None:
        """Leave out rows without a label, which cannot be measured."""
        self.keep(self.rows.answers[self.index] != 0, "unlabelled")

    def cut(self, limit: int | None) -> None:
        """Leave out all rows but the first `limit`."""
        if limit is not None:
            self.keep(np.arange(len(self.index)) < limit, "beyond_limit")

    def choose_labels(self, asks: bool, wanted: int | None) -> None:
        """Decide which rows keep their label: those with the smallest draws, where only so many are wanted."""
        has = (self.rows.answers[self.index] != 0) | (not asks)
        if wanted is not None:
            if wanted > has.sum():
                raise InputError(f"data.labelled: {wanted} labels asked, the {self.name} split has {has.sum()}")
            draws = np.where(has, self.rows.draws["labels"][self.index], np.inf)
            has &= np.isin(np.arange(len(has)), np.argsort(draws, kind="stable")[:wanted])
        self.labelled = has

    def weigh(self) -> None:
        """Repeat or leave out rows as the weights of their sources say."""
        weights = np.array([source.weight for source in self.rows.sources])[self.rows.origins[self.index]]
        if (weights != 1).any():
            draws = self.rows.draws["weight"][self.index] if (weights % 1).any() else 1.0
            times = (np.floor(weights) + (draws < weights % 1)).astype(np.int64)
            self.counts["left_out_by_weight"] = int((times == 0).sum())
            self.counts["repeated_by_weight"] = int(np.maximum(times - 1, 0).sum())
            self.index, self.labelled = np.repeat(self.index, times), np.repeat(self.labelled, times)


def clean(name: str, rows: Rows, spec: Data, asks: bool) -> Split:
    """Order rows by their keys, leave out empty ones, settle contradictions, and drop or count equal rows."""
    order = np.lexsort((np.arange(len(rows)), rows.answers == 0, rows.keys))
    split = Split(name, rows, order, counts={"read": len(rows)})
    split.keep(~rows.empty[order], "empty")
    split.resolve_contradictions(spec.contradictions, spec.key_of(name))
    if name == "train":
        split.drop_equal(spec.contradictions == "keep")
        return split
    split.count_equal()
    if asks:
        split.drop_unlabelled()
    return split


def divide(rows: Mapping[str, Rows], spec: Data, looks: bool, asks: bool) -> dict[str, Split]:
    """Clean the rows of the given splits, and take those that are not given from the training rows.

    Args:
        rows: `train`, and `validation`, `test` and sets where the recipe gives them.
        spec: The recipe's section.
        looks: Something looks at a split during training, so that a validation split is needed.
        asks: The task has a column that is asked for: only rows with a label can be measured.

    Raises:
        InputError: Rows contradict each other, or a split is empty.
    """
    splits = {name: clean(name, own, spec, asks) for name, own in rows.items()}
    train = splits["train"]
    if {"validation", "test"} <= rows.keys():
        splits["validation"].drop_those_of(splits["test"])
    for name in {"validation", "test"} & rows.keys():  # what else is measured changes nothing about the training
        train.drop_those_of(splits[name])
    for own in splits.values():
        own.cut(spec.limit)
    for name, share in (("test", spec.test_share), ("validation", spec.validation_share)):
        if name not in rows and (name == "test" or looks):
            splits[name] = train.take(name, share)
            if asks:
                splits[name].drop_unlabelled()
    for name, own in splits.items():
        own.choose_labels(asks, spec.labelled if name == "train" else None)
        if name.startswith(SET):
            own.counts[TRAINED_ON] = int(np.isin(own.keys, train.keys).sum())
    train.weigh()
    refuse_empty(splits)
    return splits


def refuse_empty(splits: Mapping[str, Split]) -> None:
    """Refuse splits without a row. Raises InputError."""
    for name, own in splits.items():
        if not len(own.index):
            what = "row with a label" if own.counts.get("unlabelled") else "row"
            fix = " (to look at none, set evaluate_every: 0 and no keep_best)" if name == "validation" else ""
            raise InputError(f"data: no {what} is left for {name}{fix}; {count_rows(splits)}")


def count_rows(splits: Mapping[str, Split]) -> str:
    """Say how many rows each split has, and what was left out."""
    return "; ".join(
        f"{name}: {len(own.index)} used"
        + "".join(f", {count} {reason.replace('_', ' ')}" for reason, count in own.counts.items() if count)
        for name, own in splits.items()
    )

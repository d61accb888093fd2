"""The rows of each split that are used: cleaned, split, and every other row accounted for.

What becomes of a row depends on the hashes of its texts, never on its place in a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from distill.data.rows import Rows
from distill.errors import InputError
from distill.recipe.data import SPLITS
from distill.recipe.schema import Data


@dataclass(frozen=True)
class Split:
    """The rows of one split that are used."""

    rows: Rows
    index: np.ndarray
    """int64 [m] rows, in the order of their keys; a row may stand there several times."""
    labelled: np.ndarray
    """bool [m], the row keeps its label."""
    counts: dict[str, int] = field(default_factory=dict)
    """Rows read, and those left out by reason."""

    def labels(self, column: str) -> Counter[str]:
        """Count the labels, as JSON, of the rows that keep theirs or would if all did."""
        found = self.rows.table.data.column(column).take(pa.array(self.index)).value_counts().to_pylist()
        return Counter({each["values"]: each["counts"] for each in found if each["values"] != "null"})


class Ledger:
    """The rows of one split that are left, in the order of their keys, and the others by reason."""

    def __init__(self, rows: Rows, name: str):
        self.rows, self.name = rows, name
        self.counts = {"read": len(rows)}
        order = np.lexsort((np.arange(len(rows)), rows.answers == 0, rows.keys))
        self.index = order
        self._keep(~rows.empty[order], "empty")

    def _keep(self, kept: np.ndarray, reason: str) -> None:
        left_out = int((~kept).sum())
        self.counts[reason] = self.counts.get(reason, 0) + left_out
        self.index = self.index[kept]

    @property
    def keys(self) -> np.ndarray:
        """Keys of the rows that are left, ascending."""
        return self.rows.keys[self.index]

    def resolve_contradictions(self, rule: str, key: str) -> None:
        """Settle groups of rows with equal inputs and different labels. Raises InputError where they are refused."""
        if rule == "keep":
            return
        keys, answers = self.keys, self.rows.answers[self.index]
        starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
        stops = np.r_[starts[1:], len(keys)]
        kept = np.ones(len(keys), dtype=bool)
        places: list[str] = []
        for start, stop in zip(starts[stops - starts > 1], stops[stops - starts > 1], strict=True):
            group = answers[start:stop]
            given = group[group != 0]
            if len(np.unique(given)) < 2:
                continue
            if not places:
                places = [self.rows.table[int(self.index[at])]["place"] for at in range(start, start + 2)]
            counts = Counter(given.tolist())
            winner = counts.most_common(1)[0][0] if rule == "majority" else given[0]
            kept[start:stop] = False if rule == "drop" else group == winner
        if places and rule == "refuse":
            raise InputError(
                f"data.{key}: equal texts have different labels, {int((~kept).sum())} rows more than one label each "
                f"allows, e.g. {' and '.join(places)}; mend them, or write data.contradictions: first, majority, "
                f"drop or keep"
            )
        self._keep(kept, "contradicting")

    def drop_equal(self, contradicting: bool) -> None:
        """Keep the first of rows that are equal in everything, one with a label before one without.

        Where rows may contradict each other, those with equal inputs and different labels all stay.
        """
        keys, kept = self.keys, np.zeros(len(self.index), dtype=bool)
        marks = np.rec.fromarrays([keys, self.rows.answers[self.index]]) if contradicting else keys
        kept[np.unique(marks, return_index=True)[1]] = True
        self._keep(kept, "equal")

    def count_equal(self) -> None:
        """Count rows that are equal, and keep them: a test of the user's own stays as it is."""
        keys = self.keys
        self.counts["equal_kept"] = int((keys[1:] == keys[:-1]).sum())

    def drop_those_of(self, other: Ledger) -> None:
        """Leave out rows whose input is in another split."""
        self._keep(~np.isin(self.keys, other.keys), f"also_in_{other.name.removeprefix('also.')}")

    def take(self, name: str, share: float) -> Ledger:
        """Move the share of rows with the smallest draws to a new split of that name."""
        taken = Ledger(self.rows, name)
        chosen = self.rows.draws[self.index, 0 if name == "test" else 1] < share
        taken.index, taken.counts = self.index[chosen], {}
        self.index = self.index[~chosen]
        return taken

    def drop_unlabelled(self) -> None:
        """Leave out rows without a label, which cannot be measured."""
        self._keep(self.rows.answers[self.index] != 0, "unlabelled")

    def cut(self, limit: int | None) -> None:
        """Leave out all rows but the first `limit`."""
        if limit is not None:
            self._keep(np.arange(len(self.index)) < limit, "beyond_limit")

    def weigh(self) -> None:
        """Repeat or leave out rows as the weights of their sources say."""
        weights = self.rows.weights[self.index]
        if (weights != 1).any():
            times = np.floor(weights) + (self.rows.draws[self.index, 2] < weights % 1)
            self.counts["by_weight"] = int(times.sum()) - len(self.index)
            self.index = np.repeat(self.index, times.astype(np.int64))


def divide(rows: Mapping[str, Rows], spec: Data, looks: bool, asks: bool) -> dict[str, Split]:
    """Clean the rows of the given splits, and take those that are not given from the training rows.

    Args:
        rows: `train`, and `validation` and `test` where the recipe gives them.
        spec: The recipe's section.
        looks: Something looks at a split during training, so that a validation split is needed.
        asks: The task has a column that is asked for: only rows with a label can be measured.

    Raises:
        InputError: Rows contradict each other, or a split is empty.
    """
    ledgers = {name: Ledger(own, name) for name, own in rows.items()}
    for name, own in ledgers.items():
        own.resolve_contradictions(spec.contradictions, spec.key_of(name))
        own.drop_equal(spec.contradictions == "keep") if name == "train" else own.count_equal()
    train = ledgers["train"]
    for name in rows:
        if name != "train":
            train.drop_those_of(ledgers[name])
    if "test" not in rows:
        train.cut(spec.limit)  # all rows, before they are split
        ledgers["test"] = train.take("test", spec.test_share)
    if looks and "validation" not in rows:
        ledgers["validation"] = train.take("validation", spec.validation_share)
    for name, own in ledgers.items():
        if name != "train" and asks:
            own.drop_unlabelled()
        if "test" in rows or name not in SPLITS:
            own.cut(spec.limit)
        if not len(own.index):
            what = "row with a label" if own.counts.get("unlabelled") else "row"
            counts = {other: len(each.index) for other, each in ledgers.items()}
            raise InputError(f"data: no {what} is left for {name} ({counts}; {own.counts})")
    train.weigh()
    return {name: _choose_labels(own, spec, name, asks) for name, own in ledgers.items()}


def _choose_labels(ledger: Ledger, spec: Data, name: str, asks: bool) -> Split:
    """Decide which rows keep their label: those with the smallest draws, where the recipe wants only so many."""
    has = (ledger.rows.answers[ledger.index] != 0) | (not asks)
    if name == "train" and spec.labelled is not None:
        if spec.labelled > has.sum():
            raise InputError(f"data.labelled: {spec.labelled} labels asked, the training split has {has.sum()}")
        draws = np.where(has, ledger.rows.draws[ledger.index, 3], np.inf)
        has &= np.isin(np.arange(len(has)), np.argsort(draws, kind="stable")[: spec.labelled])
    return Split(ledger.rows, ledger.index, has, ledger.counts)

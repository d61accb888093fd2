"""A release under examination: what it claims, what was found, and the verdict on each claim."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.release.figures import get_in
from distill.release.table import Table
from distill.release.wording import as_number, format_number
from distill.training.provenance import flatten

ROUNDING = 1e-4
"""Other processors sum in another order: figures that differ by less, of the value or of 1, are the same."""
SHIFT = 0.1
"""Of its width, by which an interval may have moved: a slow machine has time for fewer draws."""
SAME, WITHIN, DIFFERS = "the same", "within its interval", "DIFFERS"
MEASURES = ("loss", "perplexity", "bits", "kl", "mse", "rmse", "teacher_mse", "masked_perplexity", "cosine")
"""Metrics whose name starts like this move smoothly with the weights: in fp32 another value is another model."""
SHOWN = 60
"""Letters of a claim that the table shows."""


@dataclass(frozen=True)
class Check:
    """Something that a release claims, and what was found."""

    what: str
    claimed: str
    found: str
    verdict: str


@dataclass
class Verification:
    """A release under examination, and the checks so far."""

    folder: Path
    claims: dict[str, Any]
    """Content of its evaluation.json."""
    exact: bool = False
    """Both the release and this measurement computed in fp32."""
    checks: list[Check] = field(default_factory=list)

    @property
    def faults(self) -> int:
        """Number of claims that do not hold."""
        return sum(check.verdict == DIFFERS for check in self.checks)

    @property
    def within(self) -> int:
        """Number of figures that came out otherwise, inside their intervals."""
        return sum(check.verdict == WITHIN for check in self.checks)

    def compare(
        self, what: str, claimed: Any, found: Any, interval: Any = None, drawn: Any = None, metric: str = ""
    ) -> None:
        """Judge a figure: the same but for rounding, inside its claimed interval, or different.

        Args:
            what: The figure, in words.
            claimed: As the release says it.
            found: As it came out.
            interval: As claimed.
            drawn: As it came out. The same interval around a figure far from it is a figure that somebody edited, and
                another one around the same figure an interval that somebody did.
            metric: Its name, of a metric.
        """
        own, other = as_number(claimed), as_number(found)
        ends = [[as_number(get_in(each, side)) for side in ("low", "high")] for each in (interval, drawn)]
        if own is None or other is None:
            verdict = SAME if own == other else DIFFERS
        elif math.isclose(own, other, rel_tol=ROUNDING, abs_tol=ROUNDING if abs(own) < 1 else 0):
            verdict = SAME if drawn is None or _near(*ends) else DIFFERS
        else:
            low, high = ends[0]
            inside = low is not None and high is not None and low <= other <= high
            width = 0.0 if None in ends[1] else float(ends[1][1] or 0) - float(ends[1][0] or 0)
            edited = abs(own - other) > SHIFT * width > 0 and _near(*ends)
            other_model = self.exact and metric.startswith(MEASURES)
            verdict = WITHIN if inside and not edited and not other_model else DIFFERS
        shown = [f" [{format_number(low)}, {format_number(high)}]" if low is not None else "" for low, high in ends]
        self.checks.append(Check(what, format_number(claimed) + shown[0], format_number(found) + shown[1], verdict))

    def agree(self, what: str, claimed: str, found: str) -> None:
        """Judge a fact that is either as claimed or not."""
        own, other = (f"{text[: SHOWN - 1]}…" if len(text) > SHOWN else text for text in (claimed, found))
        self.checks.append(Check(what, own, other, SAME if claimed == found else DIFFERS))

    def match(self, what: str, claimed: Any, found: Any) -> None:
        """Judge a part of evaluation.json, but for rounding, by what it follows from; names the keys that differ."""
        sides = [flatten({"": each} if not isinstance(each, Mapping) else each) for each in (claimed, found)]
        keys = [key for key in {**sides[0], **sides[1]} if not _alike(*(each.get(key, "-") for each in sides))]
        self.agree(what, "as it follows", ", ".join(key or what for key in keys) or "as it follows")

    def leave_out(self, what: str, reason: str) -> None:
        """Name a claim that was not looked at, and why."""
        self.checks.append(Check(what, "", "", f"not checked: {reason}"))

    def table(self) -> Table:
        """Tabulate all checks."""
        rows = [(check.what, check.claimed, check.found, check.verdict) for check in self.checks]
        return Table(("what", "claimed", "found", "verdict"), rows, text_columns=4)


def _near(claimed: Sequence[float | None], drawn: Sequence[float | None]) -> bool:
    """Tell whether two intervals are the same, but for the number of draws that there was time for."""
    if None in (*claimed, *drawn):
        return [*claimed] == [*drawn]
    (low, high), (own_low, own_high) = [float(end or 0) for end in claimed], [float(end or 0) for end in drawn]
    return max(abs(low - own_low), abs(high - own_high)) <= SHIFT * (own_high - own_low)


def _alike(claimed: Any, found: Any) -> bool:
    """Tell whether two JSON values are the same but for the rounding of their numbers."""
    if isinstance(claimed, list) and isinstance(found, list):
        return len(claimed) == len(found) and all(map(_alike, claimed, found))
    own, other = as_number(claimed), as_number(found)
    if own is None or other is None:
        return bool(claimed == found)
    return math.isclose(own, other, rel_tol=ROUNDING, abs_tol=ROUNDING if abs(own) < 1 else 0)

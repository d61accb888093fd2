"""Tables and lines about the trained arms: their budgets of training, and their metrics over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.release.evidence import Evidence
from distill.release.figures import get_in
from distill.release.table import Table
from distill.release.wording import format_count, format_metric, format_number


def seeds_table(evidence: Evidence, *, short: bool = False) -> Table:
    """Tabulate mean and range of every metric of the arms that the seed changes; empty with one seed.

    Arms have their names where it is to be `short`, else the words for them.
    """
    names, found = evidence.metric_names, get_in(evidence.evaluation, "seeds", "arms") or {}
    titles = {arm: arm if short else evidence.title(arm) for arm in found}
    rows = [(titles[arm], *(_format_spread(name, own.get(name)) for name in names)) for arm, own in found.items()]
    return Table(("arm", *names), rows)


def _format_spread(metric: str, spread: Mapping[str, Any] | None) -> str:
    mean, low, high = (format_metric(metric, get_in(spread, key)) for key in ("mean", "min", "max"))
    return f"{mean} ({low} to {high})"


def seeds_title(evidence: Evidence) -> str:
    """Say over which seeds the means are; empty with one seed."""
    if not (seeds := get_in(evidence.evaluation, "seeds", "seeds")):
        return ""
    listed = ", ".join(map(str, seeds))
    return f"Mean (lowest to highest) of {len(seeds)} seeds, {listed}; released is that of seed {seeds[0]}"


def budget_lines(evidence: Evidence) -> list[str]:
    """Say for each trained arm how long and how fast it learned, and how that was chosen where several were tried."""
    lines = []
    for name, arm in evidence.arms.items():
        if arm.get("lr"):
            tokens = f", {format_count(arm['tokens'])} tokens" if arm.get("tokens") else ""
            line = f"{name}: {arm['steps']} steps, peak learning rate {format_number(arm['lr'])}{tokens}"
            lines.append(f"{line}{_describe_search(arm['search']) if arm.get('search') else ''}.")
    return lines


def _describe_search(search: Mapping[str, Any]) -> str:
    by, tried = search["by"], []
    for each in search["tried"]:
        settings = " ".join(f"{key} {format_number(each[key])}" for key in ("lr", "steps", "epochs") if key in each)
        tried.append(f"{settings}: {format_metric(by, each['metrics'].get(by))}")
    total = format_count(sum(each["tokens"] or 0 for each in search["tried"]))
    choice = f"the best {by} on the {search['split']} split of {len(tried)} settings ({', '.join(tried)})"
    return f"; {choice}, which saw {total} tokens in all"

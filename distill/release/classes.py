"""Tables of single classes, and of what they are taken for."""

from __future__ import annotations

from distill.release.evidence import Evidence, get_in
from distill.release.table import Table
from distill.release.wording import MISSING, format_interval, format_percent

MANY_CLASSES = 10
"""Of more classes the worst and the best are shown, half of the number each; evaluation.json has all."""


def classes_table(evidence: Evidence) -> Table:
    """Tabulate the classes, of many the worst and the best: F1 of teacher and student, and what they are taken for."""
    found = evidence.evaluation.get("per_class") or {"classes": {}, "confusion": {}}
    ours, theirs = (found["classes"].get(arm, {}) for arm in ("distilled", "teacher"))
    names = sorted({**theirs, **ours}, key=lambda name: get_in(ours, name, "f1") or 0.0)
    if len(names) > MANY_CLASSES:
        names = [*names[: MANY_CLASSES // 2], *names[-MANY_CLASSES // 2 :]]
    rows = []
    for name in names:
        own, other = ours.get(name, {}), theirs.get(name, {})
        wrong = [pair for pair in found["confusion"].get("distilled", []) if pair[0] == name != pair[1]]
        taken = f"{wrong[0][1]} ({wrong[0][2]})" if wrong else MISSING
        scores = [format_percent(each.get("f1")) + format_interval("f1", each) for each in (other, own)]
        shares = [format_percent(own.get(key)) for key in ("precision", "recall")]
        rows.append((name, taken, str(own.get("true", other.get("true", 0))), *scores, *shares))
    head = ("class", "most often taken for", "examples", "F1 of the teacher", "F1", "precision", "recall")
    return Table(head, rows, text_columns=2)


def confusion_table(evidence: Evidence) -> Table:
    """Tabulate true against predicted classes of the student; of many classes the most frequent mistakes."""
    pairs = get_in(evidence.evaluation, "per_class", "confusion", "distilled") or []
    names = sorted({name for pair in pairs for name in pair[:2]})
    if len(names) > MANY_CLASSES:
        wrong = [pair for pair in pairs if pair[0] != pair[1]][:MANY_CLASSES]
        return Table(("true", "predicted", "times"), [(*pair[:2], str(pair[2])) for pair in wrong], text_columns=2)
    counts = {(true, predicted): times for true, predicted, times in pairs}
    rows = [(name, *(str(counts.get((name, other), 0)) for other in names)) for name in names]
    return Table(("true, predicted:", *names), rows)

"""Intervals by drawing rows again: against exact distributions, by their coverage, and where drawing cannot tell."""

from __future__ import annotations

import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from distill.evaluation import intervals
from distill.evaluation.classes import NONE, tabulate_classes
from distill.evaluation.formulas import mean, of_shares
from distill.evaluation.intervals import FEW, Units, draw_metrics, newcombe_interval, units_of, wilson_interval
from distill.evaluation.metrics import METRICS, columns_of, compute, find_metric, is_share
from distill.evaluation.table import tabulate


def hits(*right):
    right = np.array(right)
    return {"predictions": right.astype(int), "references": np.ones(len(right), dtype=int)}


def arms_of(names=("accuracy",), **rows):
    functions = {name: find_metric(name, next(iter(rows.values()))) for name in names}
    values = {
        arm: {name: function(*(own[column] for column in columns_of(function))) for name, function in functions.items()}
        for arm, own in rows.items()
    }
    return draw_metrics(rows, values, names, Units(np.arange(len(next(iter(next(iter(rows.values())).values()))))))


def test_half_right_of_eight_rows_has_the_quantiles_of_the_binomial_distribution():
    # Of Binomial(8, 1/2) at most 1 has the probability 0.035 and 0 0.004, so that 1 / 8 is its quantile of 0.025.
    found = arms_of(distilled=hits(1, 0) | hits(*[1, 0] * 4))["accuracy"].of("distilled")
    assert (found["low"], found["high"], found["by"]) == (1 / 8, 7 / 8, "bootstrap of 1000")


def test_the_mean_of_a_column_has_the_normal_interval():
    values = np.random.default_rng(0).normal(size=400)
    columns = {"values": values, "targets": np.zeros(400)}
    found = arms_of(["mse"], distilled=columns)["mse"].of("distilled")
    squares = values**2
    error = squares.std() / math.sqrt(400)
    assert found["low"] == pytest.approx(squares.mean() - 1.96 * error, abs=0.4 * error)
    assert found["high"] == pytest.approx(squares.mean() + 1.96 * error, abs=0.4 * error)


@pytest.mark.parametrize(("name", "chance"), [("accuracy", 0.8), ("accuracy", 0.95), ("perplexity", None)])
def test_nineteen_of_twenty_intervals_hold_the_truth(monkeypatch, name, chance):
    monkeypatch.setattr(intervals, "RESAMPLES", 200)
    random, held = np.random.default_rng(1), 0
    for _ in range(150):
        if chance is None:  # nll of a row is exponential, so that perplexity is e
            columns, truth = {"nll": random.exponential(size=60), "tokens": np.ones(60, dtype=int)}, math.e
        else:
            columns, truth = hits(*(random.random(60) < chance)), chance
        found = arms_of([name], distilled=columns)[name].of("distilled")
        held += found["low"] <= truth <= found["high"]
    # With 0.95 each, fewer than 131 of 150 have a probability below 0.0001; drawing 60 rows loses a little of it.
    assert held >= 131


def test_what_is_hard_for_both_arms_leaves_their_difference():
    random = np.random.default_rng(2)
    hard = random.random(300) < 0.4
    ours, theirs = ~hard | (random.random(300) < 0.1), ~hard & (random.random(300) < 0.97)
    draws = arms_of(distilled=hits(*ours), cut=hits(*theirs))["accuracy"]
    pair, (own, other) = draws.between("distilled", "cut"), (draws.of(arm) for arm in ("distilled", "cut"))
    apart = math.hypot(own["high"] - own["low"], other["high"] - other["low"])
    assert pair["high"] - pair["low"] < apart / 2
    assert pair["value"] == pytest.approx(ours.mean() - theirs.mean()) and pair["low"] > 0


def test_all_right_or_all_wrong_has_the_interval_of_wilson():
    right, wrong = hits(*[1] * 20), hits(*[0] * 20)
    draws = arms_of(distilled=right, cut=wrong)["accuracy"]
    z = 1.959964
    assert draws.of("distilled")["low"] == pytest.approx(20 / (20 + z**2), abs=1e-6)
    assert draws.of("cut")["high"] == pytest.approx(z**2 / (20 + z**2), abs=1e-6)
    assert draws.of("distilled")["by"] == "Wilson" and draws.of("distilled")["high"] == 1
    assert wilson_interval(0.3, 40) == pytest.approx(stats.binomtest(12, 40).proportion_ci(method="wilson"))
    # Newcombe 1998, table II: 56 of 70 less 48 of 80 is 0.2 with [0.0524, 0.3339]; with one n for both it is as here.
    low, high = newcombe_interval(1.0, 1.0, 20)
    assert low == pytest.approx(-high) and low < 0
    pair = draws.between("distilled", "cut")
    assert pair["by"] == "Newcombe"
    assert pair["low"] < pair["value"] == 1.0 and "same on every draw" in pair["note"]


def columns_of_all(n, alike):
    """Every column that a metric reads; of rows that are all alike where it is asked for."""
    random = np.random.default_rng(3)

    def draw(values):
        return np.array(values)[np.zeros(n, dtype=int) if alike else random.integers(len(values), size=n)]

    columns = {name: draw([1, 2, 3]) for name in ("nll", "tokens", "kl_sum", "positions", "text_bytes")}
    columns |= {name: draw([1, 0]) for name in ("correct", "agreed", "entities_found")}  # no more than there are
    columns |= {name: draw([3, 4]) for name in ("entities_predicted", "entities_true")}
    columns |= {name: draw([0, 1, 2]) for name in ("predictions", "references")} | {
        "none_class": np.zeros(n, dtype=int)
    }
    columns |= {
        name: draw([0.2, 0.6]) for name in ("values", "targets", "teacher_values", "confidence", "teacher_cosine")
    }
    vectors = np.ones((n, 3)) if alike else random.normal(size=(n, 3))
    columns |= {"embeddings": vectors, "pair_embeddings": vectors[::-1], "teacher_embeddings": vectors**2}
    columns |= {"generated": draw(["a b", "b c"]), "target_text": draw(["a b", "a c"])}
    return columns | {"answers": draw(["a b", "b"]), "gold": draw(['["a b"]', '["b c"]'])}


@pytest.mark.parametrize("n", [1, 3, FEW, 40])
@pytest.mark.parametrize("alike", [True, False])
def test_no_metric_has_an_interval_without_a_width(monkeypatch, n, alike):
    monkeypatch.setattr(intervals, "RESAMPLES", 120)
    rows = {arm: columns_of_all(n, alike) for arm in ("teacher", "distilled")}
    table = tabulate(rows, list(METRICS), 3, ["a", "b", "c"])
    (pairs,) = table["differences"]
    for own in (*table["arms"][1]["intervals"].items(), *pairs["metrics"].items()):
        name, found = own
        assert found["low"] is None or found["low"] < found["high"], (name, found)
        assert found["low"] is not None or found["note"], name
        assert not is_share(name) or found["low"] is not None or table["arms"][1]["metrics"][name] is None
    for own in table["per_class"]["classes"]["distilled"].values():
        assert own["low"] < own["high"]


def test_the_teacher_against_itself_has_no_interval():
    rows = {"teacher": columns_of_all(20, alike=False)}
    (arm,) = tabulate(rows, ["agreement", "loss"], 1)["arms"]
    assert arm["intervals"]["agreement"] == {"low": None, "high": None, "by": "", "note": "the teacher against itself"}
    assert arm["intervals"]["loss"]["low"] is not None


def test_documents_are_drawn_with_all_their_rows():
    document = np.array([5, 5, 5, 7, 9, 9, 5])
    units = Units(document)
    assert len(units) == 3
    for number in range(20):
        drawn = document[units.draw(number)]
        times = {name: (drawn == name).sum() / (document == name).sum() for name in (5, 7, 9)}
        assert sum(times.values()) == 3 and all(times[name] % 1 == 0 for name in times)
    columns = {"example": np.arange(40), "document": np.arange(40) // 4}
    assert units_of(columns, "rows")[1] == "documents" and len(units_of(columns, "rows")[0]) == 10
    assert units_of({**columns, "document": np.zeros(40)}, "rows")[1] == "rows"  # one document tells nothing


def test_rows_of_one_document_that_are_alike_make_a_wider_interval():
    random = np.random.default_rng(4)
    nll = np.repeat(random.exponential(size=20), 10)
    columns = {"nll": nll, "tokens": np.ones(200, dtype=int)}
    alone = tabulate({"distilled": columns}, ["loss"], 1)["arms"][0]["intervals"]["loss"]
    together = {"distilled": {**columns, "document": np.repeat(np.arange(20), 10)}}
    table = tabulate(together, ["loss"], 1)
    wide = table["arms"][0]["intervals"]["loss"]
    assert table["drawn"] == {"unit": "documents", "number": 20, "level": 0.95, "seed": 0}
    assert wide["high"] - wide["low"] > 2 * (alone["high"] - alone["low"])


def slow(values):
    return float(values.mean())


def fragile(values):
    if len(np.unique(values)) < len(values):
        raise ValueError("rows are equal")
    return 1.0


def test_a_users_metric_has_an_interval_unless_it_is_slow_or_fails_on_drawn_rows(monkeypatch):
    monkeypatch.setitem(sys.modules, "theirs", sys.modules[__name__])
    columns = {"values": np.arange(30.0)}
    names = ["theirs:slow", "theirs:fragile"]
    found = arms_of(names, distilled=columns)
    assert found["theirs:slow"].of("distilled")["by"] == "bootstrap of 1000"
    assert found["theirs:fragile"].of("distilled")["note"] == "it fails on drawn rows: ValueError: rows are equal"
    monkeypatch.setattr(intervals, "SECONDS", -1.0)
    note = arms_of(names[:1], distilled=columns)["theirs:slow"].of("distilled")["note"]
    assert "slow to compute: 1 draws" in note


def test_a_perplexity_that_overflows_has_no_interval():
    columns = {"nll": np.full(20, 1e5), "tokens": np.ones(20, dtype=int)}
    table = tabulate({"distilled": columns}, ["perplexity"], 1)
    assert table["arms"][0]["metrics"]["perplexity"] is None
    assert table["arms"][0]["intervals"]["perplexity"]["note"] == "not finite"


def test_a_word_error_rate_above_one_is_no_share_and_has_no_closed_interval():
    columns = {"generated": np.array(["a b c"] * 20), "target_text": np.array(["d"] * 20)}
    few = {name: values[:3] for name, values in columns.items()}
    for rows, note in ((columns, "the same on every draw"), (few, "n too small: 3")):
        table = tabulate({"distilled": rows, "cut": rows}, ["wer"], 1)
        assert table["arms"][0]["metrics"]["wer"] == 3
        for own in (table["arms"][0]["intervals"]["wer"], table["differences"][0]["metrics"]["wer"]):
            assert (own["low"], own["note"]) == (None, note)


def test_draws_that_overflow_are_counted_beside_the_interval_of_the_others():
    nll = np.ones(400)
    nll[0] = 700 * 400 / 4.5  # drawn five times it is more than exp() can hold: 1 draw in 270
    columns = {"nll": nll, "tokens": np.ones(400, dtype=int)}
    draws = arms_of(["perplexity"], distilled=columns, cut=columns)["perplexity"]
    assert re.fullmatch(r"not finite on \d of 1000 draws", draws.of("distilled")["note"])
    assert draws.of("distilled")["low"] < draws.of("distilled")["high"] < math.inf
    assert draws.between("distilled", "cut")["value"] == 0.0


def test_the_shares_of_rows_are_counted_before_the_clock_of_the_draws_runs(monkeypatch):
    clock = [0.0]

    def slow_shares(values):
        clock[0] += 2 * intervals.SECONDS
        return values

    monkeypatch.setattr(intervals, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setitem(METRICS, "exact_text", of_shares(mean)(slow_shares))
    monkeypatch.setattr(intervals, "RESAMPLES", 120)
    found = arms_of(["exact_text"], distilled={"values": np.arange(30.0) / 30})["exact_text"].of("distilled")
    assert found["by"] == "bootstrap of 120" and "note" not in found


def test_the_confusion_of_a_class_counts_by_hand():
    true, ours = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 1])
    rows = {"distilled": {"references": true, "predictions": ours}}
    found = tabulate_classes(rows, ["x", "y", "z"], Units(np.arange(6)))
    assert found["confusion"]["distilled"][0] == ["x", "x", 2]
    assert sorted(found["confusion"]["distilled"][1:]) == [["x", "y", 1], ["y", "x", 1], ["y", "y", 1], ["z", "y", 1]]
    by_class = found["classes"]["distilled"]
    assert {key: by_class["x"][key] for key in ("true", "predicted", "precision", "recall", "f1")} == {
        "true": 3, "predicted": 3, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3,
    }  # fmt: skip
    assert by_class["z"] == {**by_class["z"], "true": 1, "predicted": 0, "precision": None, "recall": 0.0, "f1": 0.0}
    assert by_class["z"]["high"] > 0
    mean = np.mean([own["f1"] for own in by_class.values()])
    assert mean == compute(["f1_macro"], rows["distilled"])["f1_macro"]


def test_a_class_that_is_called_as_a_missing_side_is_has_its_figures():
    right = {"references": np.array([0, 1]), "predictions": np.array([0, 1])}
    found = tabulate_classes({"distilled": right}, ["x", NONE], Units(np.arange(2)))
    assert found["classes"]["distilled"][NONE]["f1"] == 1


def test_sets_of_classes_and_spans_are_decisions_that_may_lack_a_side():
    sets = {"references": np.array([[1, 1], [0, 1]]), "predictions": np.array([[1, 0], [1, 1]])}
    found = tabulate_classes({"distilled": sets}, ["x", "y"], Units(np.arange(2)))["confusion"]["distilled"]
    assert sorted(found) == [[NONE, "x", 1], ["x", "x", 1], ["y", NONE, 1], ["y", "y", 1]]
    spans = {"entity_pairs": np.array(['[["PER", "PER"], ["LOC", "PER"]]', "[]", '[[null, "LOC"], ["PER", null]]'])}
    table = tabulate_classes({"distilled": spans}, [], Units(np.arange(3)))
    by_type = table["classes"]["distilled"]
    assert by_type["PER"]["f1"] == 2 * 1 / (2 + 2) and by_type["LOC"]["f1"] == 0
    assert [NONE, "LOC", 1] in table["confusion"]["distilled"] and NONE not in by_type
    assert tabulate_classes({"distilled": {"nll": np.ones(3)}}, [], Units(np.arange(3))) is None

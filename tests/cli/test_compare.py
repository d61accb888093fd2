"""`distill compare`: figures of several runs side by side, the front, and what the recipes differ in."""

from __future__ import annotations

import contextlib
import io
import json
from types import SimpleNamespace

import pytest
from tiny import RECIPE

from distill.cli import main
from distill.release.wording import MISSING


def compare(*arguments, code=0):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = main(["compare", *map(str, arguments)])
    assert got == code, err.getvalue()
    return SimpleNamespace(table=out.getvalue(), said=err.getvalue())


def made_run(folder, score, parameters, *, primary="accuracy", recipe=RECIPE, teacher=0.9, length=64, **data):
    """Write the two files of a finished run that are compared."""
    sizes = {
        name: {"parameters": count, "flops_per_example": 10 * count, "latency_ms": {"p50": count / 100}}
        for name, count in (("teacher", 1000), ("student", parameters))
    }
    evaluation = {
        "data": {
            "source": "rows",
            "split": "test",
            "measured_on": "rows",
            "examples": 50,
            "train_examples": 9,
            "fingerprint": "0",
            **data,
        },
        "metrics": [primary],
        "primary": primary,
        "higher_is_better": {primary: primary != "kl"},
        "arms": [
            {"name": "teacher", "metrics": {primary: teacher}},
            {"name": "distilled", "metrics": {primary: score}, "retained": {primary: score / teacher}},
        ],
        "efficiency": {"protocol": {"device": "cpu", "length": length}, "models": sizes},
    }
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def row(found, name):
    line = next(line for line in found.table.splitlines() if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_runs_that_no_other_beats_are_on_the_front(tmp_path):
    small, large = made_run(tmp_path / "small", 0.7, 100), made_run(tmp_path / "large", 0.8, 500)
    beaten = made_run(tmp_path / "beaten", 0.65, 200)
    found = compare(small, large, beaten)
    assert row(found, "small")[1:4] == ["70.0 %", "77.8 %", "100"]
    assert "parameters" in row(found, "small")[-1] and "parameters" in row(found, "large")[-1]
    assert row(found, "beaten")[-1] == MISSING
    assert row(found, "teacher")[1] == "90.0 %"


def test_flops_and_times_of_examples_of_other_lengths_are_said_to_be_no_comparison(tmp_path):
    short, long = (made_run(tmp_path / str(length), 0.7, 100, length=length) for length in (16, 128))
    said = compare(short, long).said
    assert (
        "FLOPs and latency are those of other inputs (16: length 16; 128: length 128): compare the parameters" in said
    )
    assert "FLOPs" not in compare(short, made_run(tmp_path / "same", 0.8, 90, length=16)).said


def test_of_metrics_where_less_is_better_the_lower_value_is_on_the_front(tmp_path):
    good, bad = (made_run(tmp_path / name, score, 100, primary="kl") for name, score in (("good", 0.1), ("bad", 0.2)))
    found = compare(good, bad)
    assert row(found, "bad")[-1] == MISSING and "parameters" in row(found, "good")[-1]


def test_keys_that_differ_are_listed_and_no_others(tmp_path):
    runs = [
        made_run(tmp_path / str(steps), 0.7, 100, recipe=RECIPE.replace("seed: 3", f"seed: {steps}"))
        for steps in (4, 8)
    ]
    found = compare(*runs)
    assert row(found, "seed") == ["seed", "4", "8"] and "training" not in found.table


def test_what_cannot_be_compared_is_said_or_refused(tmp_path):
    first = made_run(tmp_path / "first", 0.7, 100)
    assert "different examples" in compare(first, made_run(tmp_path / "fewer", 0.7, 100, examples=20)).said
    assert "data differ" in compare(first, made_run(tmp_path / "other", 0.7, 100, fingerprint="1")).said
    assert "different teachers" in compare(first, made_run(tmp_path / "third", 0.7, 100, teacher=0.8)).said
    assert "different metrics" in compare(first, made_run(tmp_path / "kl", 0.7, 100, primary="kl"), code=2).said
    assert "named twice" in compare(first, first, code=2).said
    made_run(first / "release", 0.7, 100)
    assert "named twice" in compare(first, first / "release", code=2).said
    assert "one run alone" in compare(first, code=2).said
    assert "no run that reached" in compare(first, tmp_path, code=2).said


def test_runs_of_one_name_are_told_apart_by_the_folder_above(tmp_path):
    runs = [made_run(tmp_path / side / "run" / "release", 0.7, 100) for side in ("a", "b")]
    found = compare(*runs)
    assert "a/run" in found.table and "b/run" in found.table


def test_runs_of_one_name_in_folders_of_one_name_are_told_apart_further_up(tmp_path):
    found = compare(*(made_run(tmp_path / own / "here" / "run", 0.7, 100) for own in ("one", "two")))
    assert row(found, "one/here/run")[1] == row(found, "two/here/run")[1] == "70.0 %"


def test_the_page_draws_every_run_and_holds_no_code(tmp_path):
    hostile = made_run(tmp_path / "<script>alert(1)<", 0.7, 100)
    compare(hostile, made_run(tmp_path / "second", 0.8, 300), "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 3 and page.count("<circle") == 9 and "<script" not in page
    assert "second" in page and len(page) < 100_000


@pytest.mark.parametrize("name", ["page", "."])
def test_a_page_is_only_written_to_a_file_of_its_kind(tmp_path, name):
    runs = [made_run(tmp_path / str(number), 0.7, 100) for number in range(2)]
    assert "no name of an HTML page" in compare(*runs, "--out", tmp_path / name, code=2).said

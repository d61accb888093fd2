"""An evaluation of any other shape is refused where it is read, or card and report can show it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.errors import InputError
from distill.files import read_written
from distill.pipeline.json_shapes import Evaluation, Search
from distill.release.card import render_card
from distill.release.evidence import Evidence
from distill.release.report import render_report

OTHERS = ([], {}, None, "x", 7, [7])
MORE = {
    "precision": {"teacher": "float32", "students": "bfloat16", "released": {"dtype": "float32", "examples": 9}},
    "taught_by": [{"model": "./a", "weight": 1.0, "sources": ["b"], "revision": None, "sha256": None}],
    "seeds": {"seeds": [0, 1], "arms": {"distilled": {"accuracy": {"values": [0.5, 0.6]}}}, "sets": {}},
    "harness": {"lm_eval": "0", "arms": {"teacher": [{"task": "a", "metric": "b", "value": 1.0, "stderr": None}]}},
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON value, of lists that of the last item."""
    yield path
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[-1:] if isinstance(value, list) else ()
    for key, own in items:
        yield from places(own, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a place; None of a key: without it."""
    found = copy.deepcopy(value)
    at = found
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = new
    return found


def test_every_other_shape_of_an_evaluation_is_refused_or_shown(evidence: Evidence, tmp_path: Path) -> None:
    evaluation, path = {**evidence.evaluation, **MORE}, tmp_path / "evaluation.json"
    path.write_text(json.dumps(evaluation))
    assert read_written(path, Evaluation) == evaluation
    refused = shown = 0
    for number, place in enumerate([each for each in places(evaluation) if each]):
        path.write_text(json.dumps(changed(evaluation, place, OTHERS[number % len(OTHERS)])))
        try:
            found = read_written(path, Evaluation)
        except InputError as error:
            assert f"{path} is not as distill wrote it ({place[0]}" in str(error)
            refused += 1
        else:
            (render_report if number % 3 else render_card)(replace(evidence, evaluation=found))
            shown += 1
    assert refused > 100 and shown > 50


@pytest.mark.parametrize("key", ["data", "metrics", "primary", "higher_is_better", "arms"])
def test_an_evaluation_without_a_key_is_refused(evidence: Evidence, key: str, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({name: own for name, own in evidence.evaluation.items() if name != key}))
    with pytest.raises(InputError, match=rf"\({key}: Field required\); remove it, and give the same command again"):
        read_written(path, Evaluation)


@pytest.mark.parametrize("text", ["", "[", "[]", '{"by": NaN}', '{"by": -Infinity}', "\x00", '{"by": "a"}'])
def test_what_is_no_json_of_ours_is_one_message_with_its_file_and_the_fix(text: str, tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(text)
    with pytest.raises(InputError, match=r"search\.json.*; its run goes on without it$"):
        read_written(tmp_path / "search.json", Search, "its run goes on without it")

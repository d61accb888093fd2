"""Names, the functions behind them, and their parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.errors import InputError
from distill.registry import bind, find, is_reference, nearest


def scale(value: float, *, factor: float = 2.0, times: int = 1, name: str | None = None, flip: bool = False) -> float:
    return (-value if flip else value) * factor * times


def anything(value: float, **own: Any) -> float:
    return value + len(own)


TABLE: dict[str, Callable[..., float]] = {"scale": scale, "anything": anything}


def test_a_name_is_found_in_the_table() -> None:
    assert find(TABLE, "scale", "score") is scale


def test_an_unknown_name_lists_the_options_and_the_closest() -> None:
    with pytest.raises(InputError, match=r"unknown score 'scal'; did you mean 'scale'.*scale, anything"):
        find(TABLE, "scal", "score")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a user's module with a function and a constant."""
    text = (
        "LIMIT = 3\ndef huber(a): return a\ndef two(a, b): return a\ndef by_name(a, factor): return a\ndef none(): 1\n"
    )
    (tmp_path / "users_losses.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "users_losses"


def test_a_users_function_is_imported(module: str) -> None:
    assert find(TABLE, f"{module}:huber", "loss")(3) == 3
    assert find(TABLE, f"{module}:by_name", "loss")(3, factor=1) == 3  # as the rows take it


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("users_losses:hubr", "no function 'hubr'; did you mean 'users_losses:huber'"),
        ("users_losses:LIMIT", "no function 'LIMIT'"),
        ("users_losses:two", "'users_losses:two' cannot be called with 1 arguments by position"),
        ("users_losses:none", "'users_losses:none' cannot be called with 1 arguments by position"),
        ("time:sleep", "'time:sleep' does not say which parameters it takes"),
        ("no_such_module:f", "No module named 'no_such_module'.*PYTHONPATH"),
        ("os;ls:f", "unknown loss"),
        ("./x:f", "unknown loss"),
        (".x:f", "unknown loss"),
    ],
)
@pytest.mark.usefixtures("module")
def test_a_users_function_that_cannot_be_had_is_refused(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        find(TABLE, name, "loss")


@pytest.mark.parametrize(
    ("name", "valid"), [("a.b:c", True), ("a:b.c", False), ("a-b:c", False), (":c", False), ("a", False)]
)
def test_references_are_dotted_identifiers(name: str, valid: bool) -> None:
    assert is_reference(name) is valid


def test_parameters_are_bound() -> None:
    assert bind(scale, {"factor": 3, "times": 2, "name": None, "flip": True}, "params")(1.0) == -6.0
    assert bind(anything, {"x": 1}, "params")(1.0) == 2.0
    assert bind(scale, {}, "params") is scale


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"facto": 1}, "losses.0.params.facto: scale has no parameter 'facto'; did you mean 'factor'"),
        ({"value": 1}, "no parameter 'value'"),
        ({"factor": "3"}, "losses.0.params.factor: expected a number, got '3'"),
        ({"factor": True}, "expected a number, got True"),
        ({"times": 1.5}, "expected a whole number, got 1.5"),
        ({"times": True}, "expected a whole number, got True"),
        ({"flip": 1}, "expected true or false, got 1"),
        ({"name": 1}, "expected text or null, got 1"),
    ],
)
def test_wrong_parameters_are_refused(params: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        bind(scale, params, "losses.0.params")


@pytest.mark.parametrize(
    ("name", "close"), [("Batch-Size", "batch_size"), ("lr", "lr"), ("batchsize", "batch_size"), ("zzz", None)]
)
def test_the_nearest_name_ignores_case_and_dashes(name: str, close: str | None) -> None:
    assert nearest(name, ["batch_size", "lr"]) == close

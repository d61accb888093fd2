"""The shapes of the JSON files that one stage writes and another, or another verb, reads back.

They hold what is read without asking whether it is there, as a table in which keys stand one beside the other; a file
may say more.
"""
# ruff: noqa: UP013

from __future__ import annotations

from typing import Any, NotRequired

from typing_extensions import TypedDict

Figures = dict[str, float | None]
Named = dict[str, dict[str, Any]]
Counts = dict[str, int]

Stamp = TypedDict(
    "Stamp", {"made_from": str, "inputs": dict[str, Any], "results": dict[str, str], "seconds": float,
              "peak_bytes": int | None},
)  # fmt: skip
Examined = TypedDict("Examined", {"split": str, "examples": int, "metrics": Figures, "weakness": str})
Cached = TypedDict("Cached", {"cache": str, "files": list[str]})
RepairStep = TypedDict("RepairStep", {"name": str, "notes": list[str], "held_out": Figures})
Repair = TypedDict("Repair", {"held_out": dict[str, Any], "steps": list[RepairStep]})
Tried = TypedDict("Tried", {"metrics": Figures, "tokens": int | None})
Search = TypedDict("Search", {"by": str, "split": str, "tried": list[Tried], "chosen": int})

Arm = TypedDict(
    "Arm",
    {"name": str, "metrics": Figures, "steps": NotRequired[int], "lr": NotRequired[float | None],
     "tokens": NotRequired[int | None], "search": NotRequired[Search | None], "intervals": NotRequired[Named]},
)  # fmt: skip
Difference = TypedDict("Difference", {"against": str, "metrics": Named})
Classes = TypedDict("Classes", {"classes": dict[str, Named], "confusion": dict[str, list[tuple[str, str, int]]]})
TrainedOn = TypedDict("TrainedOn", {"same_source": bool, "rows": int, "of": int})
Measured = TypedDict(
    "Measured",
    {"arms": list[Arm], "differences": NotRequired[list[Difference]], "per_class": NotRequired[Classes | None],
     "trained_on": NotRequired[TrainedOn | None]},
)  # fmt: skip
Split = TypedDict(
    "Split",
    {"rows": Counts, "classes": Counts, "labelled": int, "examples": int, "tokens": int, "lengths": Counts,
     "truncated": int, "truncated_share": float, "unknown_share": float},
)  # fmt: skip
Data = TypedDict(
    "Data",
    {"source": str, "split": str, "examples": int, "train_examples": int, "fingerprint": str,
     "summary": NotRequired[dict[str, Split]]},
)  # fmt: skip
Spread = TypedDict("Spread", {"values": list[float | None]})
Spreads = dict[str, dict[str, Spread]]
Seeds = TypedDict("Seeds", {"seeds": list[int], "arms": Spreads, "sets": dict[str, Spreads]})
Form = TypedDict("Form", {"path": str, "runtime": str, "bytes": int, "difference": float, "largest": float})
TaskFigure = TypedDict("TaskFigure", {"task": str, "metric": str, "value": float, "stderr": float | None})
Harness = TypedDict("Harness", {"lm_eval": str, "arms": dict[str, list[TaskFigure]]})
Model = TypedDict("Model", {"parts": NotRequired[Counts | None]})
Speed = TypedDict("Speed", {"protocol": dict[str, Any], "models": dict[str, Model]})
Drawn = TypedDict("Drawn", {"unit": str, "number": int, "level": float})
Released = TypedDict("Released", {"dtype": str, "examples": int})
Precisions = TypedDict("Precisions", {"teacher": str, "students": str, "released": Released | None})
Matrix = TypedDict("Matrix", {"side": str, "layer": int, "neurons": int})
Sparsity = TypedDict("Sparsity", {"zeros": float, "widths": list[int], "matrices": NotRequired[list[Matrix]]})
Taught = TypedDict(
    "Taught", {"model": str, "weight": float, "sources": list[str] | None, "revision": str | None, "sha256": str | None}
)
Evaluation = TypedDict(
    "Evaluation",
    {"data": Data, "metrics": list[str], "primary": str, "higher_is_better": dict[str, bool], "arms": list[Arm],
     "differences": NotRequired[list[Difference]], "per_class": NotRequired[Classes | None],
     "sets": NotRequired[dict[str, Measured]], "rivals": NotRequired[dict[str, str]],
     "not_run": NotRequired[dict[str, str]], "drawn": NotRequired[Drawn | None],
     "precision": NotRequired[Precisions | None], "taught_by": NotRequired[list[Taught] | None],
     "licences": NotRequired[dict[str, dict[str, str]]],
     "efficiency": NotRequired[Speed | None], "seeds": NotRequired[Seeds | None],
     "harness": NotRequired[Harness | None], "sparsity": NotRequired[Sparsity | None],
     "forms": NotRequired[dict[str, Form]]},
)  # fmt: skip

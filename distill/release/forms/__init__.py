"""Other forms of a release (`release.also`): written into its folder, run in their own runtime, compared, published."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from distill.errors import InputError, RunError
from distill.release.forms import ctranslate2, gguf, onnx
from distill.release.forms.form import Form, Probe, run_fresh

FORMS: dict[str, tuple[Form, ...]] = {
    "onnx": (onnx.FORM,),
    "int8": (onnx.INT8,),
    "ctranslate2": (ctranslate2.FORM, ctranslate2.INT8),
    "gguf": (gguf.FORM, gguf.INT8),
}
"""Name in a recipe -> what is written and measured for it, in this order."""


def check_forms(names: Sequence[str], config: Any, auto_class: str) -> None:
    """Refuse forms that models of this kind cannot have, and those whose packages are missing.

    Args:
        names: The recipe's `release.also`.
        config: Config of the teacher, or of the student.
        auto_class: The transformers Auto class of the task.

    Raises:
        InputError: With the reason, or the command that installs what is missing.
    """
    for name in names:
        for form in FORMS[name]:
            if reason := form.refuse(config, auto_class):
                raise InputError(f"release.also: {name}: {reason}; remove it")
            missing = [each for each in form.packages if importlib.util.find_spec(each) is None]
            if missing:
                raise InputError(
                    f"release.also: {name} needs {', '.join(missing)}: pip install 'distill[{form.extra}]'"
                )


def write_forms(
    folder: Path, model: Any, preprocessors: Sequence[Any], names: Sequence[str], probe: Probe
) -> dict[str, dict[str, Any]]:
    """Write the forms that a recipe asks for into a release, and prove each in a fresh process of its own runtime.

    Args:
        folder: The release, not yet published.
        model: The trained student in fp32, in eval mode on the CPU; exporting may change settings of its config.
        preprocessors: Its tokenizer, and whatever else makes its inputs.
        names: The recipe's `release.also`.
        probe: Inputs of the model, [B, L].

    Returns:
        Title -> `path`, `bytes`, `runtime`, and `difference` and `largest` as measured, of each form.

    Raises:
        InputError: A form cannot hold this tokenizer or what is made of the model's outputs.
        RunError: A form cannot be written or run, or says something else than the student.
    """
    found = {}
    for name in (each for each in FORMS if each in names):
        for form in FORMS[name]:
            if form.write is not None:
                try:
                    form.write(folder, model, preprocessors, probe)
                except InputError as error:
                    raise InputError(f"release.also: {name}: {error}; remove it") from error
                except Exception as error:  # of other packages, which raise anything
                    raise RunError(f"release.also: {name}: cannot be written: {_last_line(error)}") from error
            found[form.title] = compare_form(name, form, folder, model, probe)
    return found


def compare_form(name: str, form: Form, folder: Path, model: Any, probe: Probe) -> dict[str, Any]:
    """Run a form in a fresh process, on the probe and on its shortest row alone, and compare it with the student.

    Raises:
        RunError: It cannot be run, gives other outputs, or they differ by more than its tolerance.
    """
    path, gap, largest = folder / form.path, 0.0, 0.0
    probes = [probe, shortest_row(probe)]
    found = run_fresh(form.program, path, probes, form.settings(model, form.path), form.title)
    for each, answers in zip(probes, found, strict=True):
        expected = form.answer(model, each)
        if _shapes(answers) != _shapes(expected):
            raise RunError(f"release.also: {name}: outputs {_shapes(answers)}, of the student {_shapes(expected)}")
        for key, own in expected.items():
            said = onnx.at_real_positions(key, answers[key], each)
            gap = max(gap, (said - own.float()).abs().max().item() if torch.isfinite(said).all() else torch.inf)
            largest = max(largest, own.abs().max().item())
    allowed = form.tolerance(model) if callable(form.tolerance) else form.tolerance
    if not gap <= (allowed or torch.finfo(torch.float32).max) * max(1.0, largest):
        raise RunError(f"release.also: {name}: its outputs differ from the student's by up to {gap:.3g}")
    files = path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.name}*")
    size = sum(file.stat().st_size for file in files if file.is_file())
    runtime = f"{form.packages[-1]} {version(form.packages[-1])}"
    return {"path": form.path, "bytes": size, "runtime": runtime, "difference": gap, "largest": largest}


def shortest_row(probe: Probe) -> dict[str, torch.Tensor]:
    """Select the row with the fewest real tokens, without its padding: another batch size and length than the probe."""
    masks = {"": probe.get("attention_mask"), "decoder_": probe.get("decoder_attention_mask")}
    row = 0 if masks[""] is None else int(masks[""].sum(-1).argmin())
    cut = {}
    for name, tensor in probe.items():
        mask = masks["decoder_" if name.startswith("decoder_") else ""]
        fits = mask is not None and tensor.ndim == 2 and mask.shape == tensor.shape
        cut[name] = tensor[row : row + 1, mask[row].bool()] if fits and mask is not None else tensor[row : row + 1]
    return cut


def examples(names: Sequence[str], auto_class: str, folder: str) -> Mapping[str, str]:
    """Write the card's example of each runtime, by the titles of its forms: of several, for the first."""
    found: dict[tuple[str, ...], list[Form]] = {}
    for form in (form for name in FORMS if name in names for form in FORMS[name]):
        found.setdefault(form.packages, []).append(form)
    return {"; ".join(form.title for form in forms): forms[0].example(auto_class, folder) for forms in found.values()}


def _shapes(answers: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in sorted(answers.items())}


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


__all__ = ["FORMS", "check_forms", "compare_form", "examples", "write_forms"]

"""Inspect a model before anything is cut: norms, zeros, redundancy of layers, and the layers that would go.

Nothing here knows a policy by name: each row of the table is tried, and one that cannot work on what is there is listed
with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.data.builtin import SOURCES
from distill.data.sources import read_source
from distill.errors import InputError
from distill.models.family import layers_of, layout_of
from distill.models.layout import StackName
from distill.models.load import load_student, load_tokenizer, teacher_path
from distill.models.mlp import mlps_of
from distill.models.plan import StudentPlan
from distill.ranks import process_state
from distill.recipe.headers import look_at_folder
from distill.recipe.locate import is_path
from distill.recipe.schema import Source, Student, Teacher
from distill.registry import find
from distill.release.table import Printed, Table
from distill.release.wording import MISSING, format_number, format_percent
from distill.student import LAYER_POLICIES, Statistics, calibrate
from distill.student.plan import plan_student

BATCH = 16
"""Examples per forward pass; does not change the statistics."""


def open_model(name: str) -> Any:
    """Load the model in a folder, an installed package or on the hub, with the class that its config names.

    Raises:
        InputError: There is no such model, or its family is not known.
    """
    folder = model_folder(name, "MODEL")
    if (folder / "config.json").is_file() and (mistakes := look_at_folder(folder, weights=True)[1]):
        raise InputError("; ".join(mistakes))
    model = load_student(folder)
    layout_of(model)
    return model


def model_folder(name: str, key: str) -> Path:
    """Find the folder of a model that the argument `key` of a command names: a path, a package or a hub id."""
    path = Path(name).expanduser()
    return teacher_path(Teacher(model=str(path.absolute()) if path.exists() else name), Path.cwd(), key=key)


def read_statistics(path: Path, model: Any) -> Statistics:
    """Read those of an earlier calibration. Raises InputError when they are not those of a model of this shape."""
    statistics = Statistics.load(path)
    for side in layout_of(model).sides:
        own, mlps = statistics.of(side), mlps_of(model, side)
        if len(own.block_influence()) != len(mlps) or any(
            own.mean_abs(index).shape[-1] != mlp.width for index, mlp in enumerate(mlps)
        ):
            raise InputError(f"{path} is the calibration of another model: it has other layers or MLP widths")
    return statistics


def gather_statistics(name: str, model: Any, source: str, examples: int, max_length: int) -> Statistics:
    """Calibrate over texts of a source: a built-in corpus, or a file.

    Raises:
        InputError: The source cannot be read, or the model is an encoder-decoder.
    """
    if layout_of(model).encoder is not None:
        raise InputError("--data: an encoder-decoder cannot be calibrated yet; leave the option out")
    tokenizer = load_tokenizer(model_folder(name, "MODEL"))
    given = f"./{source}" if Path(source).expanduser().is_file() and not source.startswith(("/", "~", ".")) else source
    if not is_path(given):
        find(SOURCES, given, "data source")
    rows = read_source(Source(source=given), "train", ["text"], Path.cwd())
    texts = [row["text"] for _, row in islice(rows, examples) if row.get("text")]
    if not texts:
        raise InputError(f"--data: {source} has no rows with a column text")
    settings = {"truncation": True, "max_length": max_length, "padding": True, "padding_side": "right"}
    batches = (
        dict(tokenizer(texts[start : start + BATCH], return_tensors="pt", **settings))
        for start in range(0, len(texts), BATCH)
    )
    return calibrate(model.to(process_state().device), batches)


def inspect_model(model: Any, statistics: Statistics | None, keep_layers: int | None = None) -> list[Printed]:
    """Tabulate everything that is known about a model; `keep_layers` None: half of them, rounded up.

    Raises:
        InputError: More layers are asked for than there are.
    """
    model = model.cpu()
    depth = len(layers_of(model))
    keep = keep_layers or -(-depth // 2)
    if keep > depth:
        raise InputError(f"--keep-layers: {keep} layers asked, the model has {depth}")
    weights = [tabulate_weights(model, side) for side in layout_of(model).sides]
    redundancy = [] if statistics is None else tabulate_redundancy(model, statistics)
    return [*weights, *redundancy, tabulate_policies(model, statistics, keep)]


def tabulate_weights(model: Any, side: StackName) -> Printed:
    """Tabulate norms and zeros of attention and MLP in each layer of one stack."""
    head = ("layer", "norm of attention", "norm of MLP", "zeros in attention", "zeros in MLP", "silent neurons")
    rows = []
    for index, mlp in enumerate(mlps_of(model, side)):
        names = set(mlp.axis.tensors)
        matrices = {name: tensor.detach() for name, tensor in mlp.layer.named_parameters() if tensor.ndim > 1}
        inside = [tensor for name, tensor in matrices.items() if name in names]
        outside = [tensor for name, tensor in matrices.items() if name not in names]
        norms = [format_number(_norm(tensors)) for tensors in (outside, inside)]
        zeros = [format_percent(_zeros(tensors)) for tensors in (outside, inside)]
        silent = (mlp.weight_out == 0).all(dim=-2)
        rows.append((str(index), *norms, *zeros, f"{int(silent.sum())} of {silent.numel()}"))
    return Printed(
        "Weights" + (" of the encoder" if side == "encoder" else ""),
        Table(head, rows, 0),
        "Norms are 2-norms over all weights; attention means everything in a layer but its MLP and its vectors (biases "
        "and norms). Zeros: share of weights that are exactly 0. Silent: neurons whose outgoing weights are all 0.",
    )


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(sum(float(tensor.float().norm()) ** 2 for tensor in tensors) ** 0.5)


def _zeros(tensors: Sequence[Tensor]) -> float:
    return sum(int((tensor == 0).sum()) for tensor in tensors) / max(1, sum(tensor.numel() for tensor in tensors))


def tabulate_redundancy(model: Any, statistics: Statistics) -> list[Printed]:
    """Tabulate the figures of the statistics for single layers, and for blocks of them."""
    figures = dict(_plan(model, statistics, len(layers_of(model)), "first").layer_scores)
    blocks = []
    for side in layout_of(model).sides:
        distances, prefix = statistics.of(side).angular_distance(), "encoder " if side == "encoder" else ""
        figures[f"{prefix}angular distance"] = distances.diagonal(offset=1).tolist()
        for length in range(1, len(distances) - 1):
            steps = distances.diagonal(offset=length)
            start = int(steps.argmin())
            block = str(start) if length == 1 else f"{start} to {start + length - 1}"
            blocks.append((f"{prefix}{length}", block, format_number(float(steps.min()))))
    deepest = max(map(len, figures.values()))
    rows = [
        (str(i), *(format_number(values[i]) if i < len(values) else MISSING for values in figures.values()))
        for i in range(deepest)
    ]
    return [
        Printed(
            "Redundancy of layers",
            Table(("layer", *(name.replace("_", " ") for name in figures)), rows, 0),
            "Over the calibration sample. A layer with a low figure changes what passes through it little. The angular "
            "distance, arccos(cos) / π, is that between a layer's input and output at the last token of each text.",
        ),
        Printed(
            "Redundancy of blocks",
            Table(("layers in a row", "nearest to nothing", "angular distance"), blocks, 2),
            "For each length, the block whose output is nearest to its input.",
        ),
    ]


def tabulate_policies(model: Any, statistics: Statistics | None, keep: int) -> Printed:
    """Tabulate the layers that each policy would keep and drop."""
    depth, rows = len(layers_of(model)), []
    for name in LAYER_POLICIES:
        try:
            kept = _plan(model, statistics, keep, name).kept_layers
        except ValueError as error:
            rows.append((name, MISSING, MISSING, str(error)))
            continue
        dropped = [index for index in range(depth) if index not in kept]
        rows.append((name, _join(kept), _join(dropped), ""))
    title = f"Which layers would go, keeping {keep} of {depth}"
    return Printed(title, Table(("policy", "keeps", "drops", "not possible"), rows, 4), "`student.layers.choose`")


def _plan(model: Any, statistics: Statistics | None, keep: int, policy: str) -> StudentPlan:
    # All neurons are kept, for which the cheapest score will do.
    settings = {"layers": {"keep": keep, "choose": policy}, "mlp": {"score": "random"}}
    return plan_student(model, Student.model_validate(settings), statistics)


def _join(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices)) or MISSING

"""What is in a model before anything is cut: norms, zeros, redundancy of layers and neurons, and what would go.

Nothing here knows a score, a policy or an allocation by name: each row of their tables is tried, and one that cannot
work on what is there is listed with its reason. `N` layers, `F` neurons of an MLP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data import collate, read_texts
from distill.data.corpus import Corpus, Examples
from distill.data.tasks import causal_lm, encode_each
from distill.errors import InputError
from distill.models.family import layers_of, layout_of
from distill.models.forward import UNLABELLED
from distill.models.layout import StackName
from distill.models.load import load_student, load_tokenizer, teacher_path
from distill.models.mlp import Mlp, mlps_of
from distill.models.plan import StudentPlan
from distill.ranks import process_state
from distill.recipe.schema import Data, Student, Teacher
from distill.release import charts
from distill.release.card import Table
from distill.release.evidence import MISSING, number, percent
from distill.release.report import Figure, Section, is_wide
from distill.student import ALLOCATIONS, CHOICES, SCORES, MlpLayer, Statistics, calibrate
from distill.student.plan import plan_student

QUANTILES = {"lowest": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "highest": 1.0}
DRAWN = {"5 %": "c0", "median": "total", "95 %": "c1"}
"""Quantiles in the pictures -> class of the stylesheet."""
BATCH = 16
"""Examples per forward pass; does not change the statistics."""


@dataclass(frozen=True)
class Question:
    """What the student would keep, for the parts that ask what would be removed."""

    layers: int | None = None
    """How many layers; None: half of them, rounded up."""
    mlp: int | float = 0.5
    """Neurons of each MLP, or the share of them."""
    multiple_of: int = 1


def open_model(name: str) -> Any:
    """The model in a folder, an installed package or on the hub, with the class that its config names.

    Raises:
        InputError: There is no such model, or its family is not known.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = teacher_path(Teacher(model=name), Path.cwd())
    model = load_student(folder)
    layout_of(model)
    return model


def read_statistics(path: Path, model: Any) -> Statistics:
    """Statistics of an earlier calibration. Raises InputError when they are not those of a model of this shape."""
    statistics = Statistics.load(path)
    for side in layout_of(model).sides:
        own, mlps = statistics.of(side), mlps_of(model, side)
        if len(own.block_influence()) != len(mlps) or any(
            own.mean_abs(index).shape[-1] != mlp.width for index, mlp in enumerate(mlps)
        ):
            raise InputError(f"{path} is the calibration of another model: it has other layers or MLP widths")
    return statistics


def gather_statistics(name: str, model: Any, source: str, examples: int, max_length: int) -> Statistics:
    """One pass over texts of a source: a built-in corpus, or a file.

    Raises:
        InputError: The source cannot be read, or the model is an encoder-decoder.
    """
    if layout_of(model).encoder is not None:
        raise InputError("--data: an encoder-decoder cannot be calibrated yet; leave the option out")
    folder = Path(name).expanduser()
    tokenizer = load_tokenizer(folder if folder.is_dir() else teacher_path(Teacher(model=name), Path.cwd()))
    given = f"./{source}" if Path(source).expanduser().is_file() and not source.startswith(("/", "~", ".")) else source
    texts = read_texts(Data(source=given, task="causal_lm"), 0, Path.cwd())
    chosen = [text for text, _ in texts.train][:examples]
    sample = Examples(encode_each(chosen, tokenizer, max_length), np.full(len(chosen), UNLABELLED))
    corpus = Corpus(causal_lm(), sample, sample, (), int(tokenizer.pad_token_id), "")
    starts = range(0, len(chosen), BATCH)
    batches = (collate(corpus, sample, range(start, min(start + BATCH, len(chosen)))) for start in starts)
    return calibrate(model.to(process_state().device), batches)


def inspect_model(model: Any, statistics: Statistics | None, question: Question) -> list[Section]:
    """Every part of the report, each a table with its pictures.

    Raises:
        InputError: `question` asks for more layers than there are.
    """
    model = model.cpu()
    depth = len(layers_of(model))
    keep = question.layers or -(-depth // 2)
    if keep > depth:
        raise InputError(f"--keep-layers: {keep} layers asked, the model has {depth}")
    weights = [weight_section(model, side) for side in layout_of(model).sides]
    scores = [score_section(name, model, statistics) for name in SCORES]
    missing = [section for section in scores if isinstance(section, tuple)]
    shown = [section for section in scores if isinstance(section, Section)]
    return [
        *weights,
        *redundancy_sections(model, statistics),
        policy_section(model, statistics, keep),
        *shown,
        *([missing_section(missing)] if missing else []),
        width_section(model, statistics, question),
    ]


# --- weights ----------------------------------------------------------------------------------------------------------


def weight_section(model: Any, side: StackName) -> Section:
    """Norms and zeros of attention and MLP in each layer of one stack."""
    mlps = mlps_of(model, side)
    facts = [_weight_facts(mlp) for mlp in mlps]
    rows = [
        (str(i), number(f["attention"]), number(f["mlp"]), percent(f["zeros"]), percent(f["mlp zeros"]), _silent(mlp))
        for i, (f, mlp) in enumerate(zip(facts, mlps, strict=True))
    ]
    head = ("layer", "norm of attention", "norm of MLP", "zeros in attention", "zeros in MLP", "silent neurons")
    return Section(
        f"Weights{_prefix(side, ' of the encoder')}",
        Table(head, rows, 0),
        "Norms are 2-norms over all weights; attention means everything in a layer but its MLP and its vectors (biases "
        "and norms). Zeros: share of weights that are exactly 0. Silent: neurons whose outgoing weights are all 0.",
        (
            _figure("Norms", {"attention": [f["attention"] for f in facts], "MLP": [f["mlp"] for f in facts]}),
            _figure("Zeros", {"attention": [f["zeros"] for f in facts], "MLP": [f["mlp zeros"] for f in facts]}),
        ),
    )


def _weight_facts(mlp: Mlp) -> dict[str, float]:
    own = set(mlp.axis.tensors)
    tensors = {name: tensor.detach() for name, tensor in mlp.layer.named_parameters() if tensor.ndim > 1}
    inside = [tensor for name, tensor in tensors.items() if name in own]
    outside = [tensor for name, tensor in tensors.items() if name not in own]
    return {
        "attention": _norm(outside), "mlp": _norm(inside), "zeros": _zeros(outside), "mlp zeros": _zeros(inside)
    }  # fmt: skip


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(sum(float(tensor.float().norm()) ** 2 for tensor in tensors) ** 0.5)


def _zeros(tensors: Sequence[Tensor]) -> float:
    return sum(int((tensor == 0).sum()) for tensor in tensors) / max(1, sum(tensor.numel() for tensor in tensors))


def _silent(mlp: Mlp) -> str:
    silent = (mlp.weight_out == 0).all(dim=-2)
    return f"{int(silent.sum())} of {silent.numel()}"


# --- layers -----------------------------------------------------------------------------------------------------------


def redundancy_sections(model: Any, statistics: Statistics | None) -> list[Section]:
    """What the statistics say about single layers, and about blocks of them; none without statistics."""
    if statistics is None:
        return []
    figures = dict(_plan(model, statistics, {"keep": len(layers_of(model)), "choose": "first"}).layer_scores)
    blocks = []
    for side in layout_of(model).sides:
        distances, prefix = statistics.of(side).angular_distance(), _prefix(side)
        figures[f"{prefix}angular distance"] = distances.diagonal(offset=1).tolist()
        for length in range(1, len(distances) - 1):
            steps = distances.diagonal(offset=length)
            start = int(steps.argmin())
            last = start + length - 1
            blocks.append(
                (f"{prefix}{length}", f"{start} to {last}" if length > 1 else str(start), number(float(steps.min())))
            )
    named = {name.replace("_", " "): values for name, values in figures.items()}
    deepest = max(map(len, named.values()))
    rows = [
        (str(i), *(number(values[i]) if i < len(values) else MISSING for values in named.values()))
        for i in range(deepest)
    ]
    return [
        Section(
            "Redundancy of layers",
            Table(("layer", *named), rows, 0),
            "Over the calibration sample. A layer with a low figure changes what passes through it little. The angular "
            "distance, arccos(cos) / π, is that between a layer's input and output at the last token of each text.",
            [_figure(name, {name: values}) for name, values in named.items()],
        ),
        Section(
            "Redundancy of blocks",
            Table(("layers in a row", "nearest to nothing", "angular distance"), blocks, 2),
            "For each length, the block whose output is nearest to its input.",
        ),
    ]


def policy_section(model: Any, statistics: Statistics | None, keep: int) -> Section:
    """Which layers each policy would keep and drop."""
    depth, rows = len(layers_of(model)), []
    for name in CHOICES:
        try:
            kept = _plan(model, statistics, {"keep": keep, "choose": name}).kept_layers
        except ValueError as error:
            rows.append((name, MISSING, MISSING, str(error)))
            continue
        dropped = [index for index in range(depth) if index not in kept]
        rows.append((name, _listed(kept), _listed(dropped), ""))
    title = f"Which layers would go, keeping {keep} of {depth}"
    return Section(title, Table(("policy", "keeps", "drops", "not possible"), rows, 4), "`student.layers.choose`")


# --- neurons ----------------------------------------------------------------------------------------------------------


def score_section(name: str, model: Any, statistics: Statistics | None) -> Section | tuple[str, str]:
    """How one score is spread within each layer; or its name and why it cannot be had."""
    rows, figures, shares = [], [], torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
    for side in layout_of(model).sides:
        own, lines = statistics and statistics.of(side), []
        for index, mlp in enumerate(mlps_of(model, side)):
            weights_in = [weight.detach() for weight in mlp.weights_in]
            try:
                values = SCORES[name](MlpLayer(index, weights_in, mlp.weight_out.detach(), side), own)
            except ValueError as error:
                return name, str(error)
            lines.append(values.double().cpu().flatten().quantile(shares).tolist())
            rows.append((f"{_prefix(side)}{index}", *map(number, lines[-1])))
        spread = dict(zip(QUANTILES, map(list, zip(*lines, strict=True)), strict=True))
        drawn = {quantile: spread[quantile] for quantile in DRAWN}
        figures.append(_figure(f"Score {name}{_prefix(side, ' of the encoder')}", drawn, DRAWN))
    return Section(
        f"Score {name}",
        Table(("layer", *QUANTILES), rows, 0),
        f"Quantiles over the neurons of each layer. `student.mlp.score: {name}` keeps the highest.",
        figures,
    )


def missing_section(missing: Sequence[tuple[str, str]]) -> Section:
    """Scores that cannot be had."""
    return Section("Scores that need more", Table(("score", "why"), missing, 2), "`student.mlp.score`")


def width_section(model: Any, statistics: Statistics | None, question: Question) -> Section:
    """The widths that each score and allocation would give, all layers kept."""
    rows = []
    layers = {"keep": list(range(len(layers_of(model))))}
    sides = layout_of(model).sides
    full = sum(mlp.width for side in sides for mlp in mlps_of(model, side))
    for allocation in ALLOCATIONS:
        for score in SCORES:
            mlp = {"keep": question.mlp, "multiple_of": question.multiple_of, "score": score, "allocate": allocation}
            try:
                plan = _plan(model, statistics, layers, mlp)
            except ValueError as error:
                rows.append((allocation, score, MISSING, MISSING, str(error)))
                continue
            widths = {side: [layer.width for layer in plan.stack(side)] for side in sides}
            kept = sum(width for own in widths.values() for width in own)
            shown = "; ".join(f"{_prefix(side)}{_runs(own)}" for side, own in widths.items())
            rows.append((allocation, score, percent(1 - kept / full), shown, ""))
    head = ("allocation", "score", "removed", "widths, first layer to last", "not possible")
    title = f"Which neurons would go, keeping {question.mlp} of each MLP's"
    note = "`student.mlp.allocate` and `student.mlp.score`, with all layers kept. 3 x 64: three layers with 64 neurons."
    return Section(title, Table(head, rows, 5), note)


# --- what they share --------------------------------------------------------------------------------------------------


def _plan(
    model: Any, statistics: Statistics | None, layers: dict[str, Any], mlp: dict[str, Any] | None = None
) -> StudentPlan:
    # Without a question about neurons the cheapest score will do: all of them are kept.
    return plan_student(
        model, Student.model_validate({"layers": layers, "mlp": mlp or {"score": "random"}}), statistics
    )


def _figure(title: str, lines: dict[str, list[float]], styles: dict[str, str] | None = None) -> Figure:
    drawn = [
        charts.Series(name, list(enumerate(values)), (styles or {}).get(name, f"c{index}"))
        for index, (name, values) in enumerate(lines.items())
    ]
    wide = is_wide(value for values in lines.values() for value in values)
    caption = f"{title} of each layer{', logarithmic scale' if wide else ''}."
    picture = charts.line_chart(drawn, title=title, description=caption, log=wide, axis="layer")
    return Figure(title, picture, caption)


def _prefix(side: StackName, written: str = "encoder ") -> str:
    """What tells the encoder of an encoder-decoder from everything else."""
    return written if side == "encoder" else ""


def _listed(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices)) or MISSING


def _runs(widths: Sequence[int]) -> str:
    return ", ".join(f"{count} x {width}" if count > 1 else str(width) for count, width in _grouped(widths))


def _grouped(widths: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for index in range(1, len(widths) + 1):
        if index == len(widths) or widths[index] != widths[start]:
            yield index - start, widths[start]
            start = index

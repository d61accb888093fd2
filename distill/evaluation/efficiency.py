"""Size, FLOPs, latency and throughput of several models by one protocol in one run."""

from __future__ import annotations

import copy
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.cost import WARM_UP, Rounds, flops_by_module, paired_ratio, random_batch, time_in_turns
from distill.models.forward import without_cache
from distill.models.memory import MemoryTrace

Layers = Callable[[nn.Module], Iterable[nn.Module]]
Batch = Mapping[str, Tensor]
BATCH_SIZES = (1, 8, 32)
LATENCY_PASSES = 5
"""Passes of one example per model and round, after `UNTIMED`: enough samples for a 90th percentile."""
UNTIMED = 3
"""Passes of one example that begin a turn: the first of them find another model's weights in the processor's caches."""
PATIENCE = 60.0
"""Seconds after which no other round of a batch size begins; a size that would take longer is left out, and named."""
NEW_TOKENS = 16
"""Tokens that are written one by one to time the decoding."""
PARTS = ("embeddings", "attention", "mlp", "head", "other")
ATTENTION, NORM = re.compile("attn|attention", re.IGNORECASE), re.compile("norm", re.IGNORECASE)


@dataclass(frozen=True)
class Line:
    """A line of the table: a model in one form, whatever runs it."""

    run: Callable[[Batch], object]
    """Computes a batch of inputs on the host's or the model's device."""
    figures: Mapping[str, Any]
    """What is known without the clock: `parameters`, `bytes`, `dtype` and whatever else the form has."""
    generate: Callable[[Batch, int], object] | None = None
    """Writes so many tokens after a prompt, with a key-value cache; None: it writes none."""


def model_line(model: Any, layers: Layers, one: Batch, many: Batch) -> Line:
    """Make the line of a model in eval mode; it is counted on one example, and its memory on many."""

    def run(batch: Batch) -> object:
        return model(**_typed(batch, model), **without_cache(model))

    def generate(batch: Batch, new: int) -> object:
        return model.generate(**batch, max_new_tokens=new, min_new_tokens=new, do_sample=False, num_beams=1)

    figures = count_size(model, layers) | count_flops(model, layers, one)
    if hasattr(model, "base_model"):
        figures["parts"] = bytes_by_part(model, layers)
    figures["peak_bytes"] = peak_bytes(partial(run, many), [*model.parameters(), *model.buffers(), *many.values()])
    writes = "input_ids" in one and getattr(model, "can_generate", lambda: False)()
    return Line(run, figures, generate if writes else None)


def count_figures(
    model: nn.Module, layers: Layers, *, length: int, vocabulary: int, target_length: int | None = None
) -> Mapping[str, Any]:
    """Count size, FLOPs and memory of a model as `measure_efficiency` does, without its times."""
    many = random_batch(model, (max(BATCH_SIZES), length), vocabulary, target_length)
    with torch.inference_mode():
        return model_line(model, layers, _first(many, 1), many).figures


def in_bf16(models: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the models whose weights are all fp32 to bf16, by their name and `, bf16`."""
    return {
        f"{name}, bf16": copy.deepcopy(model).to(torch.bfloat16)
        for name, model in models.items()
        if all(p.dtype == torch.float32 for p in model.parameters())
    }


def measure_efficiency(
    models: Mapping[str, nn.Module | Line],
    layers: Layers,
    *,
    kind: str,
    length: int,
    target_length: int | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    repeats: int = 9,
    vocabulary: int,
) -> dict[str, Any]:
    """Compare models in eval mode on their device; the first one (the teacher) is the reference of every ratio.

    A pass runs `length` random ids without padding and without a key-value cache; latency is that of one example. In an
    encoder-decoder it is one pass of the encoder, over the ids or over sound of the full length, and one of the decoder
    over the tokens of a whole target at once. What writes text is timed at that as well: a prompt at once (prefill),
    and token by token with a cache (decode).

    Args:
        models: Name -> model, or what runs it in another form; the first one is a model.
        layers: Gives a model's layers.
        kind: One output per example, or logits at every position; recorded in the protocol.
        length: Tokens per example.
        target_length: Tokens that the decoder of an encoder-decoder reads; None: `length`.
        batch_sizes: Examples per pass, ascending; the latency is that of a single example, whatever they are.
        repeats: Rounds of turns, fewer where they take long.
        vocabulary: Ids are drawn below this number.

    Returns:
        JSON-able `protocol`, `models` (sizes, FLOPs and speed of each) and `ratios` (of each but the first).
    """
    reference, teacher = next(iter(models.items()))
    assert isinstance(teacher, nn.Module), "the reference is a model"
    device = next(teacher.parameters()).device
    many = random_batch(teacher, (max(batch_sizes), length), vocabulary, target_length)
    one = _first(many, 1)
    turns = partial(time_in_turns, repeats=repeats, device=device, patience=PATIENCE)
    with torch.inference_mode():
        lines = {
            name: model if isinstance(model, Line) else model_line(model, layers, one, many)
            for name, model in models.items()
        }
        single = turns(_passes(lines, one), per_round=LATENCY_PASSES, untimed=UNTIMED)
        batched, skipped = _time_batches(lines, many, batch_sizes, turns, single)
        written = _time_generation(lines, one, turns)
    measured = {
        name: {**line.figures, **summarize_speed(single[name], {size: own[name] for size, own in batched.items()})}
        | written.get(name, {})
        for name, line in lines.items()
    }
    ratios = {name: compare_sizes(model, measured[reference]) for name, model in measured.items() if name != reference}
    for name, ratio in ratios.items():
        ratio["latency"] = paired_ratio(single[name], single[reference])
        largest = batched[max(batched)]
        ratio["throughput"] = paired_ratio(largest[reference], largest[name])
    protocol = {"kind": kind, "batch_size": max(batched), "batch_sizes": [*batched], **_describe(many)}
    protocol |= {"rounds": repeats, "reference": reference} | ({"left_out": skipped} if skipped else {})
    protocol |= _fewer_rounds({"one example": single, **{f"batch {n}": own for n, own in batched.items()}}, repeats)
    protocol |= {"dtype": ", ".join(sorted({model["dtype"] for model in measured.values()}))}
    return {"protocol": protocol | describe_machine(device), "models": measured, "ratios": ratios}


def _fewer_rounds(timed: Mapping[str, Rounds], repeats: int) -> dict[str, str]:
    """Name the measurements that had no time for all rounds."""
    counts = {what: len(next(iter(rounds.values()))) for what, rounds in timed.items()}
    fewer = ", ".join(f"{count} of {what}" for what, count in counts.items() if count < repeats)
    return {"fewer_rounds": fewer} if fewer else {}


def _first(batch: Batch, rows: int) -> dict[str, Tensor]:
    return {name: tensor[:rows] for name, tensor in batch.items()}


def _passes(lines: Mapping[str, Line], batch: Batch) -> dict[str, Callable[[], object]]:
    return {name: partial(line.run, batch) for name, line in lines.items()}


def _seconds_of_first(rounds: Rounds) -> float:
    """Add up the median seconds of all models in the first round."""
    return sum(statistics.median(own[0]) for own in rounds.values())


def _time_batches(
    lines: Mapping[str, Line], many: Batch, sizes: Sequence[int], turns: Callable[..., Rounds], single: Rounds
) -> tuple[dict[int, Rounds], list[int]]:
    """Time every batch size but those that would take too long by what an example took before; returns both.

    Args:
        lines: What is timed.
        many: A batch of the largest size.
        sizes: Ascending.
        turns: Times passes in turns.
        single: Times of one example, which are those of batches of one.
    """
    found: dict[int, Rounds] = {}
    each = _seconds_of_first(single)
    for size in sizes:
        if found and (WARM_UP + 1) * size * each > PATIENCE:
            break
        found[size] = single if size == 1 else turns(_passes(lines, _first(many, size)), per_round=1, untimed=1)
        each = _seconds_of_first(found[size]) / size
    return found, [size for size in sizes if size not in found]


def _time_generation(
    lines: Mapping[str, Line], one: Batch, turns: Callable[..., Rounds]
) -> dict[str, dict[str, float | None]]:
    """Measure tokens per second of a prompt and of what is written after it, of the lines that write."""
    writing = {name: line.generate for name, line in lines.items() if line.generate is not None}
    if not writing:
        return {}
    length = one["input_ids"].shape[-1]
    new = max(1, min(NEW_TOKENS, length // 2))
    prompt = {"input_ids": one["input_ids"][:, : max(1, length - new - 1)]}
    passes = {f"{name}:{count}": partial(run, prompt, count) for name, run in writing.items() for count in (1, new + 1)}
    rounds = turns(passes, per_round=1, untimed=1)
    found: dict[str, dict[str, float | None]] = {}
    for name in writing:
        first, all_ = ([*chain.from_iterable(rounds[f"{name}:{count}"])] for count in (1, new + 1))
        rest = statistics.median(long - short for short, long in zip(first, all_, strict=True))
        prefill = prompt["input_ids"].shape[-1] / statistics.median(first)
        found[name] = {"prefill": prefill, "decode": new / rest if rest > 0 else None}
    return found


def peak_bytes(run: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Run a pass and count the most bytes that are alive at once: of tensors known before, and of those that it makes.

    What kernels take for themselves inside of one operation is not seen, so that it is the same on every device.
    """
    with MemoryTrace() as trace:
        for tensor in known:
            tensor.detach()  # makes the trace see its storage
        run()
    return max((peak.total for peak in trace.peaks.values()), default=0)


def bytes_by_part(model: Any, layers: Layers) -> dict[str, int]:
    """Add up where the bytes of the weights are; a tensor that is used twice, as a tied head, counts where it is first.

    Of a layer, what attends is attention, norms are other, and the rest is the MLP with its router. Outside of layers
    stand embeddings, the head (all that a base model lacks) and the rest.
    """
    inside = {id(module): name for layer in layers(model) for name, module in layer.named_modules()}
    base = {id(p) for p in model.base_model.parameters()} if model.base_model is not model else None
    found = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if NORM.search(type(module).__name__):
            part = "other"
        elif id(module) in inside:
            part = "attention" if ATTENTION.search(inside[id(module)]) else "mlp"
        elif isinstance(module, nn.Embedding):
            part = "embeddings"
        else:
            part = "head" if base is not None and id(parameter) not in base else "other"
        found[part] += parameter.nbytes
    return found


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Collect the part of the protocol that machine and process decide; nothing in it names a host or a path."""
    return {
        "warm_up": WARM_UP,
        "latency_passes": LATENCY_PASSES,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "torch": str(torch.__version__),
    }


def count_size(model: nn.Module, layers: Layers) -> dict[str, Any]:
    """Count parameters (a tensor used twice, such as a tied head, once), those inside the layers, and bytes."""
    inside = {id(p): p.numel() for layer in layers(model) for p in layer.parameters()}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layer_parameters": sum(inside.values()),
        "bytes": sum(p.nbytes for p in model.parameters()),
        "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})),
    }


def _describe(batch: Mapping[str, Tensor]) -> dict[str, int]:
    """Say what a pass reads."""
    names = {"input_ids": "length", "input_features": "frames", "decoder_input_ids": "target_length"}
    return {title: batch[name].shape[-1] for name, title in names.items() if name in batch}


def _typed(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Give sound the dtype of a model's weights."""
    kind = next(model.parameters()).dtype
    return {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def count_flops(model: nn.Module, layers: Layers, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Count the FLOPs of a forward pass over a batch, per example; see `distill.models.cost`."""
    counts, counted_on = flops_by_module(model, _typed(batch, model))
    rows = len(next(iter(batch.values())))
    return {
        "flops_per_example": counts[model] // rows,
        "layer_flops_per_example": sum(counts[layer] for layer in layers(model)) // rows,
        "flops_counted_on": counted_on,
    }


def summarize_speed(single: list[list[float]], batched: Mapping[int, list[list[float]]]) -> dict[str, Any]:
    """Compute median and 90th percentile of the milliseconds for one example, and examples per second by batch size."""
    milliseconds = [1000 * seconds for seconds in chain.from_iterable(single)]
    p90 = statistics.quantiles(milliseconds, n=10, method="inclusive")[-1]
    by_size = {str(size): size / statistics.median(chain.from_iterable(rounds)) for size, rounds in batched.items()}
    return {
        "latency_ms": {"p50": statistics.median(milliseconds), "p90": p90},
        "throughput": by_size[str(max(batched))],
        "throughputs": by_size,
    }


def compare_sizes(model: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """Divide model by reference for sizes and FLOPs; `latency` and `throughput` join as {median, min, max}."""
    keys = ("parameters", "layer_parameters", "bytes", "peak_bytes", "flops_per_example", "layer_flops_per_example")
    known = [key for key in keys if key in model]
    return {key.removesuffix("_per_example"): model[key] / reference[key] for key in known}


def device_name(device: torch.device) -> str:
    """Return the product name of the accelerator or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if device.type == "cpu" and cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{device.type} ({names[0] if names else platform.machine()})"


def add_disk_bytes(result: dict[str, Any], folders: Mapping[str, Path]) -> None:
    """Add the size of the weight files of the models named, and its ratio to that of the first, to a measurement."""
    sizes = {name: sum(file.stat().st_size for file in path.glob("*.safetensors")) for name, path in folders.items()}
    reference = next(iter(sizes.values()))
    for name, size in sizes.items():
        result["models"][name]["disk_bytes"] = size
        if name in result["ratios"]:
            result["ratios"][name]["disk_bytes"] = size / reference

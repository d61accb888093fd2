"""Size, FLOPs, latency and throughput of several models by one protocol in one run."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.cost import WARM_UP, flops_by_module, paired_ratio, random_batch, time_in_turns
from distill.models.forward import without_cache

Layers = Callable[[nn.Module], Iterable[nn.Module]]
LATENCY_PASSES = 5
"""Passes of one example per model and round: enough samples for a 95th percentile."""


def measure_efficiency(
    models: Mapping[str, nn.Module],
    layers: Layers,
    *,
    kind: str,
    length: int,
    target_length: int | None = None,
    batch_size: int = 32,
    repeats: int = 9,
    vocabulary: int,
) -> dict[str, Any]:
    """Compare models in eval mode on their device; the first one (the teacher) is the reference of every ratio.

    A pass runs `length` random ids without padding and without a key-value cache; latency is that of one example, and
    throughput that of `batch_size`. In an encoder-decoder it is one pass of the encoder, over the ids or over sound of
    the full length, and one of the decoder over the tokens of a whole target at once.

    Args:
        models: Name -> model.
        layers: Gives a model's layers.
        kind: One output per example, or logits at every position; recorded in the protocol.
        length: Tokens per example.
        target_length: Tokens that the decoder of an encoder-decoder reads; None: `length`.
        batch_size: Examples per pass.
        repeats: Rounds of turns.
        vocabulary: Ids are drawn below this number.

    Returns:
        JSON-able `protocol`, `models` (`size`, `flops` and `speed` of each) and `ratios` (`compare_sizes` for each but
        the first).
    """
    reference = next(iter(models))
    device = next(models[reference].parameters()).device
    many = random_batch(models[reference], (batch_size, length), vocabulary, target_length)
    one = {name: tensor[:1] for name, tensor in many.items()}
    measured = {name: count_size(model, layers) | count_flops(model, layers, one) for name, model in models.items()}
    with torch.inference_mode():
        passes = {name: partial(model, **_typed(one, model), **without_cache(model)) for name, model in models.items()}
        single = time_in_turns(passes, repeats, LATENCY_PASSES, device)
        passes = {name: partial(model, **_typed(many, model), **without_cache(model)) for name, model in models.items()}
        batched = time_in_turns(passes, repeats, 1, device)
    measured = {
        name: model | summarize_speed(single[name], batched[name], batch_size) for name, model in measured.items()
    }
    ratios = {name: compare_sizes(model, measured[reference]) for name, model in measured.items() if name != reference}
    for name, ratio in ratios.items():
        ratio["latency"] = paired_ratio(single[name], single[reference])
        ratio["throughput"] = paired_ratio(batched[reference], batched[name])
    protocol = {"kind": kind, "batch_size": batch_size, **_describe(many), "repeats": repeats, "reference": reference}
    dtypes = {"dtype": ", ".join(sorted({model["dtype"] for model in measured.values()}))}
    return {"protocol": protocol | dtypes | describe_machine(device), "models": measured, "ratios": ratios}


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
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
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


def summarize_speed(single: list[list[float]], batched: list[list[float]], batch_size: int) -> dict[str, Any]:
    """Compute median and 95th percentile of the milliseconds for one example, and examples per second in a batch."""
    milliseconds = [1000 * seconds for samples in single for seconds in samples]
    p95 = statistics.quantiles(milliseconds, n=20, method="inclusive")[-1]
    return {
        "latency_ms": {"p50": statistics.median(milliseconds), "p95": p95},
        "throughput": batch_size / statistics.median(seconds for samples in batched for seconds in samples),
    }


def compare_sizes(model: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """Divide model by reference for sizes and FLOPs; `latency` and `throughput` join as {median, min, max}."""
    keys = ("parameters", "layer_parameters", "bytes", "flops_per_example", "layer_flops_per_example")
    return {key.removesuffix("_per_example"): model[key] / reference[key] for key in keys}


def device_name(device: torch.device) -> str:
    """Return the product name of the accelerator or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if device.type == "cpu" and cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{device.type} ({names[0] if names else platform.machine()})"


def add_disk_bytes(result: dict[str, Any], folders: Mapping[str, Path]) -> None:
    """Add the size of each model's weight files, and its ratio to the first model's, to a finished measurement."""
    sizes = {name: sum(file.stat().st_size for file in path.glob("*.safetensors")) for name, path in folders.items()}
    reference = next(iter(sizes.values()))
    for name, size in sizes.items():
        result["models"][name]["disk_bytes"] = size
        if name in result["ratios"]:
            result["ratios"][name]["disk_bytes"] = size / reference

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

from distill.models.cost import WARM_UP, flops_by_module, paired_ratio, random_ids, time_in_turns
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
    batch_size: int = 32,
    repeats: int = 9,
    vocabulary: int,
    device: torch.device | str,
) -> dict[str, Any]:
    """Compare models in eval mode on `device`; the first one (the teacher) is the reference of every ratio.

    A pass runs `length` random ids without padding and without a key-value cache; latency is that of one example, and
    throughput that of `batch_size`.

    Args:
        models: Name -> model.
        layers: Gives a model's layers.
        kind: One output per example, or logits at every position; recorded in the protocol.
        length: Tokens per example.
        batch_size: Examples per pass.
        repeats: Rounds of turns.
        vocabulary: Ids are drawn below this number.
        device: The device of the models.

    Returns:
        JSON-able `protocol`, `models` (`size`, `flops` and `speed` of each) and `ratios` (`compare_sizes` for each but
        the first).
    """
    device = torch.device(device)
    reference = next(iter(models))
    ids = random_ids(vocabulary, (batch_size, length), models[reference]).to(device)
    measured = {name: count_size(model, layers) | count_flops(model, layers, ids[:1]) for name, model in models.items()}
    with torch.inference_mode():
        passes = {name: partial(model, ids[:1], **without_cache(model)) for name, model in models.items()}
        single = time_in_turns(passes, repeats, LATENCY_PASSES, device)
        passes = {name: partial(model, ids, **without_cache(model)) for name, model in models.items()}
        batched = time_in_turns(passes, repeats, 1, device)
    measured = {
        name: model | summarize_speed(single[name], batched[name], batch_size) for name, model in measured.items()
    }
    ratios = {name: compare_sizes(model, measured[reference]) for name, model in measured.items() if name != reference}
    for name, ratio in ratios.items():
        ratio["latency"] = paired_ratio(single[name], single[reference])
        ratio["throughput"] = paired_ratio(batched[reference], batched[name])
    protocol = {"kind": kind, "batch_size": batch_size, "length": length, "repeats": repeats, "reference": reference}
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


def count_flops(model: nn.Module, layers: Layers, ids: Tensor) -> dict[str, Any]:
    """Count the FLOPs of a forward pass over `ids` [B, L], per example; see `distill.models.cost`."""
    counts, counted_on = flops_by_module(model, {"input_ids": ids})
    return {
        "flops_per_example": counts[model] // len(ids),
        "layer_flops_per_example": sum(counts[layer] for layer in layers(model)) // len(ids),
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

"""Cost of a forward pass: FLOPs, counted without computing, and seconds, measured in turns.

Times of a shared machine drift by more than a pruned layer saves. So every round times the models one after the other
on the same input, and a ratio is the median over rounds of the ratios within a round.
"""

from __future__ import annotations

import copy
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distill.models.forward import without_cache

Rounds = dict[str, list[list[float]]]
"""Model -> round -> seconds of each forward pass."""

WARM_UP = 2
"""Untimed passes of each model at each shape."""


def random_ids(vocabulary: int, shape: tuple[int, int], model: nn.Module) -> Tensor:
    """Draw the same ids [B, L] on every call; the only special one is the end token that each row closes with.

    Padding would turn into real padding, and the class head of BART reads every row at its end token.
    """
    config = getattr(model, "config", None)
    padding, ends = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    plain = torch.tensor([token for token in range(vocabulary) if token not in (padding, *ends)])
    ids = plain[torch.randint(len(plain), shape, generator=torch.Generator().manual_seed(0))]
    if ends[0] not in (None, padding) and ends[0] < vocabulary:
        ids[:, -1] = ends[0]
    return ids


def random_example(model: Any, length: int) -> dict[str, Tensor]:
    """Make one example of random input that any model of a known family takes, see `random_batch`."""
    config = model.config
    positions = getattr(config, "max_target_positions", None) or getattr(config, "max_position_embeddings", None)
    return random_batch(model, (1, min(length, positions or length)))


def random_batch(
    model: Any, shape: tuple[int, int], vocabulary: int | None = None, target_length: int | None = None
) -> dict[str, Tensor]:
    """Make random input of B examples with L tokens, without padding, on the device of the model.

    Args:
        model: A model; its decoder reads tokens as well, unless it has a head of classes, which feeds it by itself. A
            speech model reads the full length of sound.
        shape: B and L.
        vocabulary: Ids are drawn below this number; None: below that of the model.
        target_length: Tokens that the decoder of an encoder-decoder reads; None: L.
    """
    config: Any = getattr(model, "config", None)
    device = next(model.parameters()).device
    known = vocabulary or config.vocab_size
    inputs = {"input_ids": random_ids(known, shape, model).to(device)}
    if not getattr(config, "is_encoder_decoder", False) or model.get_output_embeddings() is None:
        return inputs
    known = min(known, getattr(config, "decoder_vocab_size", None) or known)
    target = random_ids(known, (shape[0], target_length or shape[1]), model).to(device)
    if model.main_input_name != "input_ids":
        sound = (shape[0], config.num_mel_bins, 2 * config.max_source_positions)
        inputs = {model.main_input_name: torch.zeros(sound, dtype=model.dtype, device=device)}
    return {**inputs, "decoder_input_ids": target}


def flops_by_module(model: Any, inputs: Mapping[str, Tensor]) -> tuple[dict[nn.Module, int], str]:
    """Count matrix-product FLOPs (2 per multiply-add) of a forward pass by module; causal attention counts in full.

    Counted on fake tensors, which have shapes and no values, in a copy: nothing is computed and a model that stores a
    tensor during its forward pass keeps its own. A model that reads values (`.item()`) cannot run like that and is
    counted while it really runs once.

    Returns:
        The FLOPs of each module, the model itself included, and "fake tensors" or "a real pass".
    """
    fake, log = FakeTensorMode(), logging.getLogger("torch._subclasses.fake_tensor")
    quiet, log.disabled = log.disabled, True  # it would print a traceback for what is handled here
    try:
        with FakeCopyMode(fake):
            hollow = copy.deepcopy(model).requires_grad_(False)
        with fake:
            counts = _counts(hollow, {name: fake.from_tensor(tensor) for name, tensor in inputs.items()})
        counted_on = "fake tensors"
    except (RuntimeError, AssertionError):
        # Whatever fake tensors cannot do is one of these two; a fault of the model itself comes up again here.
        counts, counted_on = _counts(model, inputs), "a real pass"
    finally:
        log.disabled = quiet
    return {module: counts.get(name, 0) for name, module in model.named_modules()}, counted_on


def _counts(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Count FLOPs by name of the module, "" for the model."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_flops})
    # torch's table of FLOPs lacks the fused attention of CPUs, which would count as nothing; as plain matrix products
    # attention counts the same on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**inputs, **without_cache(model))
    prefix = type(model).__name__
    counts = {name: sum(by_kind.values()) for name, by_kind in counter.get_flop_counts().items()}
    inside = {name.removeprefix(f"{prefix}."): count for name, count in counts.items() if name.startswith(f"{prefix}.")}
    return {**inside, "": counter.get_total_flops()}


def _grouped_flops(rows: torch.Size, weights: torch.Size, *_: Any, **__: Any) -> int:
    """Count the FLOPs of experts (rows [N, K] times the matrix of their group [E, K, M]), missing in torch's table."""
    return 2 * rows[0] * weights[1] * weights[2]


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOPs per second of a large matrix product, the peak that MFU is a share of.

    Of random numbers: a GPU multiplies equal ones faster than any that a model has.
    """
    size = 1024 if device.type == "cpu" else 8192
    random = torch.Generator(device).manual_seed(0)
    left, right = (torch.empty(size, size, dtype=dtype, device=device).normal_(generator=random) for _ in range(2))
    product = partial(torch.mm, left, right, out=torch.empty_like(left))
    rounds = time_in_turns({"product": product}, repeats=1, per_round=5, device=device)
    return 2 * size**3 / min(rounds["product"][0])


def training_flops(student: Any, teacher: Any | None, length: int, *, adapters: bool = False) -> float:
    """Count FLOPs per token of a step on texts of `length` tokens: student forward and backward, teacher forward.

    With `adapters` the weights have no gradient, so the backward pass is half; the adapters' own products are not
    counted.
    """

    def forward(model: Any) -> int:
        counts, _ = flops_by_module(model, random_example(model, length))
        return counts[model]

    passes = 2 if adapters else 3
    return (passes * forward(student) + (forward(teacher) if teacher is not None else 0)) / length


def time_in_turns(
    passes: Mapping[str, Callable[[], object]],
    repeats: int,
    per_round: int,
    device: torch.device,
    warm_up: int = WARM_UP,
    patience: float = float("inf"),
    untimed: int = 0,
) -> Rounds:
    """Time `per_round` passes in a row of every model in every round, after `warm_up` untimed passes of each.

    After so many seconds of `patience` no other round begins. So many `untimed` passes begin every turn: one that is
    served alone never finds the caches of the processor full of another's weights.
    """
    for run in passes.values():
        for _ in range(warm_up):
            run()
    rounds: Rounds = {name: [] for name in passes}
    begin = time.perf_counter()
    for number in range(repeats):
        if number and time.perf_counter() - begin > patience:
            break
        for name, run in passes.items():
            for _ in range(untimed):
                run()
            rounds[name].append([_seconds_of(run, device) for _ in range(per_round)])
    return rounds


def _seconds_of(run: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def paired_ratio(rounds: list[list[float]], reference: list[list[float]]) -> dict[str, float]:
    """Divide the median seconds within each round: {median, min, max} of the ratios over the rounds."""
    pairs = zip(rounds, reference, strict=True)
    ratios = [statistics.median(samples) / statistics.median(others) for samples, others in pairs]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def least_seconds(
    passes: Mapping[str, Callable[[], object]], device: torch.device, repeats: int = 3, patience: float = 3.0
) -> dict[str, float]:
    """Measure the seconds of each when nothing else runs: the least of some turns, fewer of those that take long.

    Args:
        passes: Name -> what is timed, after one untimed pass of each.
        device: Is waited for.
        repeats: At most so many turns.
        patience: Seconds after which no other turn begins.
    """
    rounds = time_in_turns(passes, repeats, 1, device, warm_up=1, patience=patience)
    return {name: min(seconds for (seconds,) in own) for name, own in rounds.items()}


@torch.inference_mode()
def latency_ratio(model: Any, reference: Any, length: int, repeats: int = 5, per_round: int = 5) -> float:
    """Measure the seconds for one example as a share of the reference's; both models in evaluation mode."""
    passes = {
        name: partial(each, **random_example(each, length), **without_cache(each))
        for name, each in (("model", model), ("reference", reference))
    }
    rounds = time_in_turns(passes, repeats, per_round, model.device, untimed=1)
    return paired_ratio(rounds["model"], rounds["reference"])["median"]


def _synchronize(device: torch.device) -> None:
    """Wait for the accelerator: its kernels run behind Python's back."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

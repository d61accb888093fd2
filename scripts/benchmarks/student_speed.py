"""A teacher against students of the same cost: depth cut, width cut, both; prefill and decoding.

    python scripts/benchmarks/student_speed.py
    python scripts/benchmarks/student_speed.py --device cuda --profile

Random Llamas; bf16 on a GPU, fp32 on a CPU. On a GPU the teacher has 1.24 B parameters and prefill reads 8 x 1,024
tokens; on a CPU everything is small, and one thread computes. Models take turns, and a ratio is the median over rounds
of the ratios within a round: how many times faster than the teacher.

    prefill    one pass over all tokens, beside what its FLOPs allow; `of`: the share of that which is reached
    decode     one token after a cache of a full row, batch 1, beside what the bytes that are read allow
    --profile  the share of attention, MLP, head and all else in the time of a pass, and on a GPU that of its kernels
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from distill.models.cost import flops_by_module, paired_ratio, random_batch, time_in_turns
from distill.models.family import layers_of

SHAPES = {
    "cuda": ({"hidden_size": 2048, "vocab_size": 128256, "num_attention_heads": 32}, 8192, 16, (8, 1024)),
    "cpu": ({"hidden_size": 512, "vocab_size": 32000, "num_attention_heads": 8}, 2048, 8, (4, 128)),
}
"""Device -> config, neurons, layers, and (rows, tokens) of prefill."""


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    device, (_, neurons, layers, (rows, length)) = torch.device(options.device), SHAPES[options.device]
    sizes = {
        "teacher": (layers, neurons),
        "half the layers": (layers // 2, neurons),
        "same bytes by width": (layers, _equal_width(options.device)),
        "both": (layers // 2, neurons // 2),
    }
    models = {name: make(options.device, *size) for name, size in sizes.items()}
    many, one = random_batch(models["teacher"], (rows, length)), random_batch(models["teacher"], (1, 1))
    with torch.inference_mode():
        prefill = {name: partial(model, **many, use_cache=False) for name, model in models.items()}
        decode = {name: partial(decode_one, model, one, length) for name, model in models.items()}
        passes = {"prefill": (prefill, 1), "decode": (decode, 10)}
        timed = {
            kind: time_in_turns(each, options.rounds, turns, device, untimed=1)
            for kind, (each, turns) in passes.items()
        }
    flops = {name: flops_by_module(model, many)[0][model] for name, model in models.items()}
    read = {name: bytes_read(model) for name, model in models.items()}
    print(f"{'':<22}{'layers':>7}{'width':>7}{'prefill':>9}{'FLOPs':>7}{'of':>6}{'decode':>8}{'bytes':>7}{'of':>6}")
    for name, (depth, width) in sizes.items():
        cells = []
        for kind, cost in (("prefill", flops), ("decode", read)):
            faster = paired_ratio(timed[kind]["teacher"], timed[kind][name])["median"]
            allowed = cost["teacher"] / cost[name]
            cells.append((faster, allowed, faster / allowed))
        (p, f, pf), (d, b, db) = cells
        print(f"{name:<22}{depth:>7}{width:>7}{p:>9.2f}{f:>7.2f}{pf:>6.2f}{d:>8.2f}{b:>7.2f}{db:>6.2f}")
    if options.profile:
        for name, model in models.items():
            shares(f"{name}, prefill", model, partial(model, **many, use_cache=False), device)
            shares(f"{name}, decode", model, partial(decode_one, model, one, length), device)


def make(device: str, layers: int, width: int) -> LlamaForCausalLM:
    """A Llama with random weights, its head tied."""
    sizes = SHAPES[device][0]
    config = LlamaConfig(
        **sizes,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_key_value_heads=max(1, sizes["num_attention_heads"] // 4),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16 if device == "cuda" else torch.float32).eval()


def _equal_width(device: str) -> int:
    """The width with which all layers have as many parameters as half of them whole."""
    sizes, neurons, _, _ = SHAPES[device]
    attention = 2.5 * sizes["hidden_size"] ** 2  # with a quarter of key-value heads
    whole = attention + 3 * sizes["hidden_size"] * neurons
    return int((whole / 2 - attention) / (3 * sizes["hidden_size"])) // 64 * 64


def decode_one(model: LlamaForCausalLM, token: dict, length: int) -> None:
    """Decode one token after a row of so many; the cache is as long afterwards."""
    cache = getattr(model, "row", None)
    if cache is None:
        cache = model.row = DynamicCache(config=model.config)
        model(input_ids=token["input_ids"].expand(1, length).contiguous(), past_key_values=cache)
    model(**token, past_key_values=cache)
    cache.crop(-1)


def bytes_read(model: LlamaForCausalLM) -> int:
    """Bytes of the weights that one token reads: a tied head once, of embeddings not at all."""
    return sum(parameter.nbytes for parameter in model.parameters())


@contextmanager
def _named(model: LlamaForCausalLM) -> Iterator[None]:
    """Give attention, MLPs and head a name in the profile."""
    parts: list[tuple[str, nn.Module]] = [("head", model.lm_head)]
    for layer in layers_of(model):
        parts += [("attention", layer.self_attn), ("mlp", layer.mlp)]
    for name, module in parts:

        def named(*args, _forward=module.forward, _name=name, **kwargs):
            with record_function(f"part:{_name}"):
                return _forward(*args, **kwargs)

        module.forward = named
    try:
        yield
    finally:
        for _, module in parts:
            del module.forward


def shares(title: str, model: LlamaForCausalLM, run, device: torch.device) -> None:
    """Print where the time of three passes goes."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with torch.inference_mode(), _named(model):
        run()
        with profile(activities=activities) as recorded, record_function("part:all"):
            for _ in range(3):
                run()
            if gpu:
                torch.cuda.synchronize()
    events = {event.key: event for event in recorded.key_averages() if event.key.startswith("part:")}
    host = {key.removeprefix("part:"): event.cpu_time_total for key, event in events.items()}
    kernels = {key.removeprefix("part:"): event.device_time_total for key, event in events.items()}
    used, whole = (kernels if gpu else host), host["all"]
    parts = {name: used.get(name, 0) / used["all"] for name in ("attention", "mlp", "head")}
    parts["all else"] = 1 - sum(parts.values())
    busy = f"; kernels run {kernels['all'] / whole:.0%} of the time, the rest waits for launches" if gpu else ""
    print(f"{title}: {', '.join(f'{name} {share:.0%}' for name, share in parts.items())}{busy}")


if __name__ == "__main__":
    main()

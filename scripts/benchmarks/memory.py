"""Measure what a training holds per parameter, and what gradients that are added up in bf16 lose.

    python scripts/benchmarks/memory.py
    python scripts/benchmarks/memory.py --hidden 512 --layers 8

A Llama with random weights takes three steps with each choice of `weights`, `optimizer` and `lora`; counted are the
bytes of its parameters, of their gradients and of the optimizer's state. The gradients of one batch, cut into
micro-batches, are then compared with those of fp32. Prints one JSON object.
"""

import argparse
import copy
import json
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from distill.losses import Objective
from distill.models.forward import Batch, forward
from distill.recipe.schema import Term, Training
from distill.training.lora import Adapters
from distill.training.masters import Masters
from distill.training.optim import make_optimizer

VOCABULARY, ROWS, LENGTH = 2048, 64, 64
CHOICES = {
    f"{weights}, {optimizer}{', lora' if lora else ''}": {"weights": weights, "optimizer": optimizer, "lora": lora}
    for lora in (None, {"rank": 16})
    for weights in ("fp32", "bf16")
    for optimizer in ("adamw", "adamw_8bit")
}


def made(hidden: int, layers: int) -> LlamaForCausalLM:
    """Build the model."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64}
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, **heads}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes))


def batch_of(rows: Tensor) -> Batch:
    """Make a batch in which every token is predicted."""
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}


def held(model: LlamaForCausalLM, choice: dict[str, object], rows: Tensor) -> dict[str, float]:
    """Train for three steps; count bytes per parameter of the model."""
    spec = Training(steps=1, precision="bf16", **choice)
    size = sum(parameter.numel() for parameter in model.parameters())
    adapters = Adapters(model, spec.lora) if spec.lora else None
    masters = Masters(model, adapters.parameters if adapters else set()) if spec.weights == "bf16" else None
    optimizer = make_optimizer(model, spec, masters.rests if masters else None)
    objective, batch = Objective([Term(match="labels")], "next_token"), batch_of(rows)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            objective(forward(model, batch, objective.student), None, batch, objective.counts([batch]))[0].backward()
        optimizer.step()
    state = [value for own in optimizer.state.values() for value in own.values() if isinstance(value, Tensor)]
    once = {tensor.data_ptr(): tensor.nbytes for tensor in state}
    parts = {
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "gradients": sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None),
        "optimizer": sum(once.values()),
    }
    return {name: round(count / size, 2) for name, count in {**parts, "together": sum(parts.values())}.items()}


def gradients(model: LlamaForCausalLM, rows: Tensor, micro: int, autocast: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Add up the gradients of micro-batches, in the dtype of the weights and in fp64; yields both of each parameter."""
    objective = Objective([Term(match="labels")], "next_token")
    counts, parameters = objective.counts([batch_of(rows)]), list(model.parameters())
    exact = [torch.zeros(parameter.shape, dtype=torch.float64) for parameter in parameters]
    added: list[Tensor] = []
    for part in rows.chunk(micro):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = objective(forward(model, batch_of(part), objective.student), None, batch_of(part), counts)
        own = torch.autograd.grad(loss, parameters)
        added = [before + new for before, new in zip(added, own, strict=True)] if added else list(own)
        for total, new in zip(exact, own, strict=True):
            total += new.double()
    yield from zip(added, exact, strict=True)


def relative(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Return the norm of all differences over that of the second ones."""
    apart = sum(float((a.double() - b).square().sum()) for a, b in pairs)
    return float((apart / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5)


def main() -> None:
    """Parse the arguments, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    asked = parser.parse_args()
    torch.manual_seed(0)
    rows = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    rows[:, 1::2] = (rows[:, 0::2] * 7 + 3) % VOCABULARY
    bytes_held = {name: held(made(asked.hidden, asked.layers), own, rows[:4]) for name, own in CHOICES.items()}
    half = made(asked.hidden, asked.layers).to(torch.bfloat16)
    reference = [exact for _, exact in gradients(copy.deepcopy(half).float(), rows, 1, autocast=False)]
    lost = {}
    for micro in (1, 2, 4, 8, 16, 32, 64):
        pairs = list(gradients(half, rows, micro, autocast=True))
        lost[micro] = {
            "by adding up in bf16": round(relative(pairs), 5),
            "in all, against fp32": round(relative(list(zip([a for a, _ in pairs], reference, strict=True))), 5),
        }
    json.dump(
        {"torch": torch.__version__, "bytes_per_parameter": bytes_held, "gradient_error": lost}, sys.stdout, indent=1
    )
    print()


if __name__ == "__main__":
    main()

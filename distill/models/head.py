"""The output head of a model: the last linear map, from hidden states to one logit per token or class.

`[positions, vocabulary]` is by far the largest tensor of a step, so the loss takes a model's hidden states and its head
instead of its logits. Which module is the head, a model says itself (`get_output_embeddings`); what it does to the
product afterwards is the data at the foot. Heads of classes are small and stay in the model; they only give fp32.

N positions, D what the head reads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

HeadPrecision = Literal["bf16", "tf32", "fp32"]


@dataclass(frozen=True)
class OutputHead:
    """logits(h) = cap · tanh(z / cap) with z = scale · h Wᵀ + b; without a cap they are z."""

    weight: Tensor
    """W [V, D]."""
    bias: Tensor | None = None
    """b [V]."""
    scale: float = 1.0
    cap: float | None = None
    precision: HeadPrecision | None = None
    """Precision of the operands of products with W; None: that of the weights or of autocast on a GPU, else fp32."""
    from_bf16: bool = False
    """True for a widened head (`operands`) whose weights and rows were bf16 or are to be rounded to it."""

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits: fp32, whatever the weights are (float64 stays float64)."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def operands(self, rows: Tensor) -> tuple[OutputHead, Tensor]:
        """The head without gradient and the rows it reads, both in the dtype that the matrix product takes.

        On a GPU that is the dtype of the weights (or autocast's): the product of half-precision operands is handed out
        in fp32. A CPU has no such product; there the operands are widened, since logits rounded to bf16 would put the
        gradient of a student that is close to its teacher off by a third. fp16 is widened everywhere: the gradient is
        formed before any loss scale and would vanish in it.
        """
        kind = self.wide
        if rows.device.type == "cuda":
            kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else self.weight.dtype
            kind = {"bf16": torch.bfloat16, None: kind}.get(self.precision, self.wide)
        kind = self.wide if kind == torch.float16 else kind
        bias = None if self.bias is None else self.bias.detach().to(self.wide)
        weight, rows = self.weight.detach(), rows.detach()
        short = kind == torch.float32 and rows.dtype == weight.dtype == torch.bfloat16
        if self.precision == "bf16" and kind == torch.float32:
            short, weight, rows = True, weight.bfloat16(), rows.bfloat16()
        return replace(self, weight=weight.to(kind), bias=bias, from_bf16=short), rows.to(kind)

    def logits(self, rows: Tensor, out: Tensor) -> Tensor:
        """The logits of `rows` [N, D] (self and rows from `operands`), written into `out` [N, V], without gradient."""
        with products("bf16" if self.from_bf16 else self.precision, rows.device):
            if rows.dtype != out.dtype:
                torch.mm(rows, self.weight.T, out_dtype=out.dtype, out=out)
                # Each of these is one more pass over the logits.
                if self.scale != 1:
                    out.mul_(self.scale)
                if self.bias is not None:
                    out.add_(self.bias)
            else:
                beta, start = (0, out) if self.bias is None else (1, self.bias)
                torch.addmm(start, rows, self.weight.T, beta=beta, alpha=self.scale, out=out)
        return out if self.cap is None else out.div_(self.cap).tanh_().mul_(self.cap)

    def __call__(self, rows: Tensor) -> Tensor:
        """Compute all logits [..., V] at once, with gradient: the reference of the chunked loss."""
        logits = self.scale * nn.functional.linear(rows.to(self.wide), self.weight.to(self.wide))
        return soft_cap(logits if self.bias is None else logits + self.bias, self.cap)


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Bound logits smoothly to ±cap, with gradient."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


@contextmanager
def products(precision: HeadPrecision | None, device: torch.device) -> Iterator[None]:
    """During the block, fp32 products take their operands in this precision; sums and results stay fp32.

    Args:
        precision: `tf32` is known to GPUs; a CPU may round to `bf16`, which for operands that were bf16 before is exact
            and more than twice as fast; None: as torch is set.
        device: Of the operands.
    """
    on_gpu = device.type == "cuda"
    wanted = {"tf32": "tf32", "fp32": "ieee"} if on_gpu else {"bf16": "bf16"}
    if precision not in wanted:
        yield
        return
    setting: Any = torch.backends.cuda.matmul if on_gpu else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = wanted[precision]
    try:
        yield
    finally:
        setting.fp32_precision = before


def output_head(model: Any) -> OutputHead | None:
    """The head of a model with one logit per token; None where there is none, or none of the known form.

    Args:
        model: A transformers model.
    """
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear) or module.out_features != getattr(model.config, "vocab_size", None):
        return None
    if not module.weight.is_floating_point():
        return None
    extra = getattr(model, "final_logits_bias", None)
    bias = module.bias if extra is None else extra.reshape(-1) + (0 if module.bias is None else module.bias)
    scales = [factor(value) for key, factor in SCALES.items() if (value := getattr(model.config, key, None))]
    return OutputHead(module.weight, bias, math.prod(scales), getattr(model.config, "final_logit_softcapping", None))


@contextmanager
def stop_at_head(model: Any) -> Iterator[list[Tensor]]:
    """During the block a forward pass leaves out the head and appends the head's input [B, L, D] to the list.

    The model's own code runs up to there, final norm, masked-LM transform and scaled decoder outputs included. What it
    returns as logits is then one meaningless number.
    """
    read = []

    def keep(hidden: Tensor) -> Tensor:
        read.append(hidden)
        return hidden.new_zeros(1, 1, 1)

    with _replace_forward(model.get_output_embeddings(), keep):
        yield read


@contextmanager
def _replace_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:  # somebody else's, set before
            module.forward = before


def class_head(model: Any) -> nn.Linear | None:
    """The linear map that makes the logits of a model with classes: the last one outside of its base model.

    Args:
        model: A transformers model.

    Returns:
        None where there is none with one row per class (or end of an answer), or none in floating point.
    """
    found = None
    for name, module in _outside_of_base(model):
        if isinstance(module, nn.Linear):
            rows = 2 if name == "qa_outputs" else getattr(model.config, "num_labels", None)
            found = module if module.out_features == rows else found
    return found if found is not None and found.weight.is_floating_point() else None


def _outside_of_base(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules, in order; where the model is its own base and so its layers may be anywhere, the top ones."""
    base = model.base_model
    for name, child in model.named_children():
        if base is model:
            yield name, child
        elif child is not base:
            yield from child.named_modules(prefix=name)


@contextmanager
def widen_class_logits(model: Any) -> Iterator[None]:
    """During the block the last linear map of a model with classes takes and gives fp32, whatever it is held in.

    Its logits would be rounded to bf16 otherwise, which is more than what tells a student from its teacher. The map is
    replaced and not repeated, as only in its own forward are its weights whole where they are sharded.
    """
    module: Any = class_head(model)
    if module is None or "forward" in module.__dict__:  # somebody else's forward, of whom nothing is known
        yield
        return

    def widened(hidden: Tensor) -> Tensor:
        kind = torch.promote_types(module.weight.dtype, torch.float32)
        bias = None if module.bias is None else module.bias.to(kind)
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.to(kind), module.weight.to(kind), bias)

    with _replace_forward(module, widened):
        yield


SCALES: dict[str, Callable[[float], float]] = {
    "logits_scaling": lambda value: 1 / value,  # Granite
    "logit_scale": lambda value: value,  # Cohere
}
"""Config key -> factor on the product."""

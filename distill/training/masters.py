"""AdamW on bf16 weights with fp32 masters, at 10 bytes per trained parameter, its gradient included.

A weight is held in two halves: rounded to bf16 in the model, and what the rounding left, 16 bits, in the optimizer's
state. Together they are the fp32 master, exactly:

    bits of the master = (bits of the bf16 weight << 16) + rest,    -2^15 <= rest < 2^15

The moments are bf16, too. Rounded to the nearest, a second moment would stand still: with beta2 = 0.999 it moves by at
most a thousandth of itself per step where its gradient is small, and neighbours in bf16 lie 4 to 8 thousandths apart.
So they are rounded with a dither, a fraction of that distance that is added before cutting off: step x golden ratio
modulo 1. These fractions are spread evenly, so a moment is right on average over steps (the error of the sum grows with
the logarithm of their number), and as they follow from the step alone, a resumed run rounds alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.memory import split_groups

CHUNK = {"cpu": 2**20, "cuda": 2**24}
"""Device -> parameters that are stepped at once: about 40 bytes each are needed meanwhile where nothing is compiled."""
GOLDEN = 40503
"""2^16 divided by the golden ratio."""


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split fp32 into bf16, rounded to the nearest, and the rest, int16."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(weight: Tensor, rest: Tensor) -> Tensor:
    """Put fp32 together; a weight of zero has no rest, whoever set it to zero."""
    bits = (weight.view(torch.int16).to(torch.int32) << 16) + rest
    return torch.where(weight == 0, 0, bits).view(torch.float32)


def cut_dithered(values: Tensor, dither: Tensor) -> Tensor:
    """Round fp32 to bf16, away from zero where `dither` [] (0 to 2^16 - 1) and the bits that fall off reach 2^16."""
    return ((values.view(torch.int32) + dither) >> 16).to(torch.int16).view(torch.bfloat16)


def step_in_place(tensors: list[Tensor], grad: Tensor, numbers: Tensor, dither: Tensor) -> None:
    """Take AdamW's step, in fp32 and all at once: compiled, it is one kernel that reads 10 bytes and writes 8.

    Args:
        tensors: Weight, rest, first and second moment [N]; changed in place.
        grad: [N].
        numbers: [7] lr, weight decay, shares of the gradient in the moments, bias corrections (the second one as a
            root), eps; the first four are 0 where the step is skipped.
        dither: [].
    """
    weight, rest, first, second = tensors
    lr, decay, share1, share2, correction1, correction2, eps = numbers.unbind()
    grad = torch.where(lr + share1 == 0, 0, grad.float())  # of a skipped step it may not be finite
    m = first.float().lerp(grad, share1)
    v = second.float().lerp(grad.square(), share2)
    master = join(weight, rest)
    master = master - lr * decay * master - lr / correction1 * (m / (v.sqrt() / correction2 + eps))
    for tensor, new in zip(tensors, (*split(master), cut_dithered(m, dither), cut_dithered(v, dither)), strict=True):
        tensor.copy_(new)


class MasterAdamW(torch.optim.AdamW):
    """AdamW whose bf16 parameters have fp32 masters; others, as projections, are stepped by the fused AdamW itself."""

    def __init__(self, groups: Any, rests: dict[Tensor, Tensor], **options: Any):
        """Take over what the rounding of each bf16 parameter left."""
        super().__init__(groups, fused=True, **options)
        self.rests = rests
        self.history: dict[Tensor, int] = {}
        """One number for all parameters that took the same steps, and so share one call of the arithmetic."""
        self.calls = 0
        self._take_step: Callable[..., None] = step_in_place

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step, unless the device says `found_inf` by 1."""
        assert closure is None
        self.calls += 1
        halves = [
            (group, [p for p in group["params"] if p.dtype == torch.bfloat16 and p.grad is not None])
            for group in self.param_groups
        ]
        grads = [(p, p.grad) for _, own in halves for p in own]
        for group, parameters in halves:
            if parameters:
                self._step_halves(group, parameters)
        for parameter, _ in grads:
            parameter.grad = None
        super().step()
        for parameter, grad in grads:
            parameter.grad = grad

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        rest = self.rests.pop(parameter, None)  # after a restart the state has another
        if not state:
            assert rest is not None, "every bf16 parameter has a rest"
            state["step"] = torch.zeros((), device=parameter.device)
            state["rest"] = rest.to(parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    def _step_halves(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self._state(parameter) for parameter in parameters]
        found = getattr(self, "found_inf", None)
        steps: list[Tensor] = [state["step"] for state in states]
        new = [number for number, parameter in enumerate(parameters) if parameter not in self.history]
        if new:  # read once: afterwards the host knows without asking the device
            counts = torch.stack([steps[number] for number in new]).tolist()
            self.history |= {parameters[number]: hash(count) for number, count in zip(new, counts, strict=True)}
        done = torch.ones_like(steps[0]) if found is None else 1 - found.to(steps[0])
        torch._foreach_add_(steps, [done] * len(steps))
        size = CHUNK.get(parameters[0].device.type, CHUNK["cuda"])
        order = sorted(range(len(parameters)), key=lambda number: self.history[parameters[number]])
        for history, numbered in groupby(order, key=lambda number: self.history[parameters[number]]):
            own = [(parameters[number], states[number]) for number in numbered]
            settings = _settings(group, own[0][1]["step"], done)
            pieces = chain.from_iterable(_pieces(parameter, state, size) for parameter, state in own)
            for bucket in split_groups(pieces, lambda piece: len(piece[1]), size):
                self._step_bucket(bucket, *settings)
            self.history |= {parameter: hash((history, self.calls)) for parameter, _ in own}

    def _step_bucket(self, bucket: list[_Piece], numbers: Tensor, dither: Tensor) -> None:
        tensors, grad = bucket[0][0], bucket[0][1]
        if len(bucket) > 1:
            tensors = [torch.cat(parts) for parts in zip(*(piece[0] for piece in bucket), strict=True)]
            grad = torch.cat([piece[1] for piece in bucket])
        self._call(tensors, grad, numbers, dither)
        if len(bucket) > 1:
            sizes = [len(piece[1]) for piece in bucket]
            for parts, whole in zip(zip(*(piece[0] for piece in bucket), strict=True), tensors, strict=True):
                torch._foreach_copy_(list(parts), list(torch.split(whole, sizes)))

    def _call(self, *arguments: Any) -> None:
        """Take the step compiled on a GPU; where the compiler fails, as it is from then on."""
        if self._take_step is step_in_place and arguments[1].is_cuda and not _Compiled.failed:
            self._take_step = _Compiled.get()
        try:
            self._take_step(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self._take_step is step_in_place:
                raise
            _Compiled.failed, self._take_step = True, step_in_place
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"the step of bf16 weights is not compiled, which is slower: {reason}", stacklevel=2)
            self._take_step(*arguments)


_Piece = tuple[list[Tensor], Tensor]
"""Weight, rest and moments [N], and the gradient [N]."""


class _Compiled:
    """The compiled step, one for all trainings of this process."""

    step: Callable[..., None] | None = None
    failed = False

    @classmethod
    def get(cls) -> Callable[..., None]:
        cls.step = cls.step or torch.compile(step_in_place, dynamic=True)
        return cls.step


def _pieces(parameter: Tensor, state: dict[str, Tensor], size: int) -> Iterator[_Piece]:
    """Cut a parameter into flat pieces of at most so many weights."""
    assert parameter.grad is not None
    held = [tensor.view(-1) for tensor in (parameter, state["rest"], state["exp_avg"], state["exp_avg_sq"])]
    parts = zip(*(torch.split(tensor, size) for tensor in held), strict=True)
    for own, grad in zip(parts, torch.split(parameter.grad.reshape(-1), size), strict=True):
        yield list(own), grad


def _settings(group: dict[str, Any], step: Tensor, done: Tensor) -> tuple[Tensor, Tensor]:
    """Compute on the device the numbers of `step_in_place`, and the dither of this step."""
    beta1, beta2 = group["betas"]
    exact = step.double().clamp(min=1)  # 0 before a first step that is skipped
    fixed = torch.tensor([group["lr"], group["weight_decay"], 1 - beta1, 1 - beta2], dtype=torch.float64)
    fixed = fixed.to(step.device, non_blocking=True) * done
    corrections = torch.stack([1 - beta1**exact, (1 - beta2**exact).sqrt(), torch.full_like(exact, group["eps"])])
    return torch.cat([fixed, corrections]).float(), ((exact * GOLDEN) % 2**16).to(torch.int32)


class Masters:
    """The fp32 weights of a model that is held in bf16."""

    def __init__(self, model: nn.Module, also_fp32: set[Tensor]):
        """Round the model's weights to bf16, and keep what that leaves.

        Args:
            model: In fp32, on the CPU, with `requires_grad` set.
            also_fp32: Parameters that stay as they are, as those of adapters.
        """
        self.rests: dict[Tensor, Tensor] = {}
        """Of parameters that learn, until the optimizer takes it into its state."""
        self.frozen: dict[Tensor, Tensor] = {}
        """The fp32 weights of others, where they are not bf16 exactly: they are handed back untouched."""
        self.optimizer: torch.optim.Optimizer | None = None
        for parameter in model.parameters():
            if parameter in also_fp32:
                continue
            whole = parameter.data.contiguous()
            parameter.data, rest = split(whole)
            if parameter.requires_grad:
                self.rests[parameter] = rest
            elif bool(rest.any()):
                self.frozen[parameter] = whole

    @torch.no_grad()
    def of(self, parameter: Tensor) -> Tensor:
        """Return a parameter's fp32 weights; of one that never was rounded, it itself."""
        state = self.optimizer.state.get(parameter, {}) if self.optimizer is not None else {}
        if parameter in self.frozen:
            return self.frozen[parameter].to(parameter.device)
        rest = state.get("rest", self.rests.get(parameter))
        if rest is None:
            return parameter.detach().float()
        return join(parameter.detach(), rest.to(parameter.device))

    def restore(self, model: nn.Module) -> None:
        """Put the fp32 weights in the place of the rounded ones."""
        for parameter in model.parameters():
            parameter.data = self.of(parameter)

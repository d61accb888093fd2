"""Memory of a program, counted without computing: on fake tensors, which have shapes and no values.

Every storage that an operation makes is added to the part of the memory that is being filled, and taken off when the
last tensor on it is gone, as on a device. What kernels take for themselves inside of one operation is not seen.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.errors import InputError
from distill.ranks import free_memory

T = TypeVar("T")
UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True)
class Peak:
    """The most that was there at once, and what it was made of."""

    parts: Mapping[str, int] = field(default_factory=dict)
    """Part -> bytes at that moment."""
    moment: str = ""
    """What was going on."""

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


class MemoryTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes that are alive; see `tracing`.

    Where all that an operation reads is real, it is computed: a batch and what is made of it alone, such as masks. So
    the positions that a loss selects are as many as they will be, and models see whether a mask hides anything.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = ""
        """Where new storages are counted."""
        self.moment = ""
        """What is going on."""
        self.bytes: Counter[str] = Counter()
        """Part -> bytes alive."""
        self.peaks: dict[str, Peak] = {}
        """Moment -> the most during it."""
        self._alive: dict[int, tuple[str, int]] = {}

    def fill(self, part: str, moment: str = "") -> None:
        """Count what comes as this part, and as this moment from here on."""
        self.part, self.moment = part, moment or self.moment
        self._note()

    def move(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count these tensors as another part."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            before, size = self._alive.get(key, (part, 0))
            if before != part:
                self._alive[key] = (part, size)
                self.bytes[before] -= size
                self.bytes[part] += size

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it makes."""
        kwargs = kwargs or {}
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if inputs and not any(isinstance(each, FakeTensor) for each in inputs):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        elif func is torch.ops.aten._grouped_mm.default:
            result = _grouped(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._add(each)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = (self.part, size)
            self.bytes[self.part] += size
            weakref.finalize(storage, self._drop, key)
            self._note()

    def _drop(self, key: int) -> None:
        part, size = self._alive.pop(key)
        self.bytes[part] -= size

    def _note(self) -> None:
        before = self.peaks.get(self.moment)
        if before is None or self.bytes.total() > before.total:
            self.peaks[self.moment] = Peak(dict(self.bytes), self.moment)


def _grouped(left: Tensor, right: Tensor, offsets: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Make the result of the products of experts, which fake tensors have for bf16 alone."""
    groups: tuple[int, ...] = ()
    if left.ndim == right.ndim:
        groups = left.shape[:-2] if left.ndim == 3 or offsets is None else offsets.shape
    return left.new_empty((*groups, left.shape[-2], right.shape[-1]))


@contextmanager
def tracing() -> Iterator[MemoryTrace]:
    """Open a block in which new tensors are fake and memory is counted."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    quiet, log.disabled = log.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), MemoryTrace() as trace:
            yield trace
    finally:
        log.disabled = quiet


def make_fake(module: nn.Module) -> None:
    """Give a module without weights (on the meta device) fake ones, inside the block of `tracing`; tied stay tied."""
    new: dict[Tensor, Tensor] = {}
    for each in module.modules():
        for name, tensor in (*each.named_parameters(recurse=False), *each.named_buffers(recurse=False)):
            if tensor not in new:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                new[tensor] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
            setattr(each, name, new[tensor])


def split_groups(items: Iterable[T], cost: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Split the items in order into groups that cost at most `most` together; one that costs more stands alone."""
    group: list[T] = []
    spent = 0
    for item in items:
        if group and spent + cost(item) > most:
            yield group
            group, spent = [], 0
        group.append(item)
        spent += cost(item)
    if group:
        yield group


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a device that new tensors can have, those that torch holds for later included."""
    if device.type != "cuda":
        return free_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def parse_size(text: str) -> int:
    """Read a number of bytes, e.g. `80GB`, `79.6 GiB`. Raises InputError where it is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    if match is None or match[2] not in UNITS or float(match[1]) == 0:
        raise InputError(f"--memory: {text!r} is no size; write a number and a unit, e.g. 80GB or 79.6GiB")
    return int(float(match[1]) * UNITS[match[2]])

"""A copy of a checkpoint's tensors in host memory, which training cannot change any more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from distill.training.shards import OwnFile, gathered


class HostMemory:
    """Host memory for one copy after the other.

    It is kept from checkpoint to checkpoint: memory that the process has not had before costs several times the copy.
    Of tensors on a GPU the copy is page-locked, so that the GPU makes it while the host goes on.
    """

    def __init__(self, say: Callable[[str], None]):
        """Take no memory yet. `say` receives notices."""
        self.say, self.locks_pages = say, True
        self.buffers: dict[tuple[str, str], Tensor] = {}
        self.taking: threading.Thread | None = None

    def take(self, files: Sequence[OwnFile]) -> None:
        """Begin to take, in a thread, the memory that a copy of these files will need."""
        self.taking = threading.Thread(target=self._take, args=[files], name="host memory", daemon=True)
        self.taking.start()

    def _take(self, files: Sequence[OwnFile]) -> None:
        with suppress(RuntimeError):  # raised again where the copy is made, and takes what is not there yet
            for file in files:
                for name, tensor in file.tensors.items() if file.written else ():
                    buffer = self._allocate(tensor)
                    self.buffers[file.name, name] = buffer if buffer.is_pinned() else buffer.zero_()  # touches it

    def _wait(self) -> None:
        if self.taking is not None:
            self.taking.join()
            self.taking = None

    def lacking(self, files: Iterable[OwnFile]) -> int:
        """Count the bytes of memory that a copy of these files takes beyond what is there already."""
        self._wait()
        return sum(
            self._size(tensor)
            for file in files
            if file.written
            for name, tensor in file.tensors.items()
            if not self._fits((file.name, name), tensor)
        )

    def copy(self, files: Iterable[OwnFile]) -> tuple[list[OwnFile], Callable[[], None]]:
        """Copy what this rank writes. Collective where sharded tensors are gathered.

        Returns:
            The files, over the same memory as the copy before, and a function that waits until the copy is there. The
            tensors may change at once: work that the host gives to the GPU from here on begins after the copy.
        """
        self._wait()
        copied = gathered(files, self._hold)
        if not any(tensor.is_pinned() for file in copied for tensor in file.tensors.values()):
            return copied, lambda: None
        there = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        there.record()
        return copied, there.synchronize

    def _hold(self, file: str, name: str, tensor: Tensor) -> Tensor:
        key = file, name
        if not self._fits(key, tensor):
            self.buffers.pop(key, None)
            self.buffers[key] = self._allocate(tensor)
        buffer = self.buffers[key]
        return buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda and buffer.is_pinned())

    def _fits(self, key: tuple[str, str], tensor: Tensor) -> bool:
        buffer = self.buffers.get(key)
        return buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype

    def _size(self, tensor: Tensor) -> int:
        # torch takes page-locked memory by powers of two.
        locked = self.locks_pages and tensor.is_cuda and tensor.nbytes > 0
        return 1 << (tensor.nbytes - 1).bit_length() if locked else tensor.nbytes

    def _allocate(self, tensor: Tensor) -> Tensor:
        if self.locks_pages and tensor.is_cuda:
            try:
                return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            except RuntimeError as error:
                self.locks_pages = False
                self.say(f"no page-locked memory for checkpoints ({error}): training waits while they are copied")
        return torch.empty(tensor.shape, dtype=tensor.dtype)

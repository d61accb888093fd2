"""A teacher that runs once over a split, whatever number of models is compared with it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.models.forward import Batch, Outputs, device_of, to_device
from distill.models.head import OutputHead
from distill.models.mixture import MixtureHead
from distill.teacher import LiveTeacher, Mixture

HOST_BYTES = 2**30
"""Bytes of the teacher's outputs that are held in main memory; the rest lies on disk."""


class RecordedTeacher:
    """A teacher that runs once per batch: its outputs are kept for the next model that is compared with it.

    Kept are its logits, or what its output head reads, in their own dtype: in main memory, and beyond `host_bytes` in
    one safetensors file per batch.
    """

    def __init__(self, teacher: LiveTeacher | Mixture, folder: Path, host_bytes: int):
        self.teacher, self.folder, self.free_bytes = teacher, folder, host_bytes
        self._kept: dict[int, Tensor | Path] = {}
        self._head: OutputHead | MixtureHead | None = None

    def __call__(self, batch: Batch) -> Outputs:
        """Return logits, or `last` and `head`, of a batch; its first of `examples` is what it is known by."""
        key = int(batch["examples"][0])
        if key not in self._kept:
            outputs = self.teacher(batch)
            self._head = outputs.head
            self._keep(key, outputs.logits if outputs.last is None else outputs.last)
            return outputs
        kept = self._kept[key]
        tensor = load_file(kept)["outputs"] if isinstance(kept, Path) else kept
        tensor = to_device(tensor, device_of(batch))
        return Outputs(tensor) if self._head is None else Outputs(None, last=tensor, head=self._head)

    def _keep(self, key: int, outputs: Tensor | None) -> None:
        assert outputs is not None, "a forward pass gives logits or what they are made from"
        self.free_bytes -= outputs.nbytes
        if self.free_bytes >= 0:
            self._kept[key] = outputs.cpu()
            return
        path = self.folder / f"{key}.safetensors"
        save_file({"outputs": outputs.contiguous()}, path)
        self._kept[key] = path


@contextmanager
def record_teacher(
    teacher: LiveTeacher | Mixture, folder: Path, host_bytes: int = HOST_BYTES
) -> Iterator[RecordedTeacher]:
    """Record a teacher during the block. The folder takes the outputs that memory does not, and is gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)  # a killed run left it
    folder.mkdir(parents=True)
    try:
        yield RecordedTeacher(teacher, folder, host_bytes)
    finally:
        shutil.rmtree(folder)

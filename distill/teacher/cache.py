"""A teacher whose outputs lie on disk, and the columns that they are kept in.

What is kept of a row of a batch are the outputs at the positions that a loss may read, one after the other. It is found
by what the model read (`keys`), so that it does not matter which rows stand together, how far they are padded, or in
which order they come.

B rows of a batch, L positions, N kept positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from distill.errors import InputError
from distill.models.forward import Batch, Outputs, device_of, to_device
from distill.models.head import OutputHead
from distill.models.precision import DTYPES
from distill.models.topk import TopK
from distill.teacher.keys import Index
from distill.teacher.shards import ShardFolder
from distill.teacher.topk import unpack

ENTRY = "teacher "
"""Start of the names that a batch has what is kept for it under."""
ENTRIES, HEAD = "entries", "head"
"""Files of a cache beside its columns."""
FORMS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "positions": (lambda kept: kept, lambda kept: kept),
    "row": (lambda logits: logits[:, None], lambda kept: kept[:, 0]),
    "ends": (lambda logits: logits.transpose(1, 2), lambda kept: kept.transpose(1, 2)),
}
"""Form of an output -> to [B, L, ...] and back: one entry for each position, one for the row, positions last."""


@dataclass(frozen=True)
class Column:
    """One thing that is kept of each row."""

    field: Literal["logits", "last", "topk", "hidden", "encoder_hidden"]
    """That of `Outputs`, or `topk`."""
    positions: Callable[[Batch], Tensor]
    """Mask [B, L] of the positions that are kept."""
    dtype: str = "fp32"
    layer: int | None = None
    k: int = 0
    """`topk`: tokens."""
    form: str = "positions"

    @property
    def name(self) -> str:
        """Name of its folder."""
        if self.field == "topk":
            return f"topk.{self.k}"
        return ".".join([self.field, *([] if self.layer is None else [str(self.layer)]), self.dtype])

    @property
    def entry(self) -> str:
        """Name under which a batch has it, [B, L, ...], zeros where nothing is kept."""
        return ENTRY + self.name

    def select(self, outputs: Outputs, mask: Tensor) -> Tensor:
        """Select what is kept of outputs, [N, ...]; not of a `topk`, which has to be computed."""
        value = getattr(outputs, self.field)
        value = value if self.layer is None else value[self.layer]
        kept: Tensor = FORMS[self.form][0](value)[mask.to(value.device)]
        return kept.to(DTYPES[self.dtype])


class CachedTeacher:
    """A teacher of which only what it said is there, and its output head where the logits are made by that.

    A callable like `LiveTeacher`. `add` finds what is kept for a batch, which the loader can do ahead.
    """

    def __init__(
        self,
        folder: ShardFolder,
        columns: Sequence[Column],
        keys: Callable[[Batch], np.ndarray],
        vocabulary: int,
        width: int,
    ):
        """Read the index, and the head where a column needs it.

        Args:
            folder: The cache.
            columns: What is read of it.
            keys: Hashes the rows of a batch, uint8 [B, KEY].
            vocabulary: Tokens that a `topk` was chosen from.
            width: Of the teacher's hidden states.

        Raises:
            InputError: A part of the cache is missing or damaged.
        """
        self.folder, self.columns, self.keys = folder, columns, keys
        self.vocabulary, self.width = vocabulary, width
        entries, _ = folder.read(ENTRIES)
        self.index, self.bounds = Index(entries["keys"].numpy()), entries["bounds"].numpy()
        self.head = read_head(folder) if any(column.field == "last" for column in columns) else None
        self._open: dict[str, tuple[np.ndarray, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a loader worker maps the files by itself

    def __call__(self, batch: Batch) -> Outputs:
        """Give the outputs for a batch, on its device."""
        device = device_of(batch)
        if self.head is not None and self.head.weight.device != device:
            self.head = to_device(self.head, device)
        if self.columns and self.columns[0].entry not in batch:
            batch = to_device(self.add(batch), device)
        found = Outputs(None)
        for column in self.columns:
            value: Any = FORMS[column.form][1](batch[column.entry])
            if column.field == "topk":
                kept, shape = unpack(value.flatten(0, 1), column.k, self.vocabulary), value.shape[:2]
                parts = [part.reshape(*shape, -1) for part in (kept.ids, kept.log_probabilities)]
                found = replace(found, logits=TopK(*parts))  # type: ignore[arg-type]
            elif column.layer is not None:
                getattr(found, column.field)[column.layer] = value
            else:
                found = replace(found, **{column.field: value})
        return replace(found, head=self.head)

    def add(self, batch: Batch) -> Batch:
        """Add what is kept for a batch to it.

        Raises:
            InputError: Nothing is kept for a row, or a shard that has one is missing or damaged.
        """
        rows = self.index.find(self.keys(batch))
        # A text that is not there is nobody's input; the batch has it where others have a second one.
        real = batch["attention_mask"].bool().any(-1).cpu().numpy() if "input_ids" in batch else rows >= -1
        if (rows[real] < 0).any():
            raise InputError(
                f"{self.folder.root} has nothing for {(rows[real] < 0).sum()} of {real.sum()} rows of a batch: the "
                f"teacher never read them. A task that draws its examples at random says so with `draws = True`"
            )
        return {**batch, **{column.entry: self._gather(column, batch, rows) for column in self.columns}}

    def _gather(self, column: Column, batch: Batch, rows: np.ndarray) -> Tensor:
        mask = column.positions(batch).cpu()
        shards = np.searchsorted(self.bounds, rows, side="right") - 1
        parts, counts = [], mask.sum(1).tolist()
        for row, shard, count in zip(rows.tolist(), shards.tolist(), counts, strict=True):
            if not count:
                continue
            starts, values = self._map(column, shard)
            start, stop = starts[row - self.bounds[shard] :][:2].tolist()
            assert stop - start == count, f"{column.name}: {stop - start} positions of a row that has {count}"
            parts.append(values[start:stop])
        tail = parts[0] if parts else self._map(column, 0)[1][:0]
        dense = torch.zeros(mask.numel(), *tail.shape[1:], dtype=tail.dtype)
        if parts:
            dense.index_copy_(0, mask.flatten().nonzero().squeeze(-1), torch.cat(parts))
        return dense.reshape(*mask.shape, *tail.shape[1:])

    def _map(self, column: Column, shard: int) -> tuple[np.ndarray, Tensor]:
        name = shard_name(column, shard)
        if name not in self._open:
            tensors, _ = self.folder.read(name)
            self._open[name] = tensors["starts"].numpy(), tensors["values"]
        return self._open[name]


def shard_name(column: Column, shard: int) -> str:
    """Name a column's part in a shard."""
    return f"{column.name}/{shard:05}"


def write_head(folder: ShardFolder, head: OutputHead) -> None:
    """Keep a head."""
    given = {"weight": head.weight, "bias": head.bias}
    tensors = {name: tensor.detach().cpu() for name, tensor in given.items() if tensor is not None}
    folder.write(HEAD, tensors, {"scale": head.scale, "cap": head.cap})


def read_head(folder: ShardFolder) -> OutputHead:
    """Read a head that was kept. Raises InputError where it is missing or damaged."""
    tensors, facts = folder.read(HEAD)
    return OutputHead(tensors["weight"], tensors.get("bias"), facts["scale"], facts["cap"])

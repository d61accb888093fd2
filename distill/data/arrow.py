"""Tables in Arrow files that are mapped into memory: columns of texts, numbers, and lists of numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill.data.tasks.task import Ragged


class ArrowFile:
    """A table that stays in its file until rows of it are looked at; n rows."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return type(self), (self.path,)  # a loader worker maps the file by itself

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def table(self) -> pa.Table:
        """The file, mapped into memory."""
        with pa.memory_map(str(self.path)) as file:
            return pa.ipc.open_stream(file).read_all()

    @cached_property
    def columns(self) -> dict[str, Lists | Texts | Numbers]:
        """Name -> values, as views of the file."""
        return {field.name: _column_type(field.type)(self.table.column(field.name)) for field in self.table.schema}

    def take(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """Return the columns of some rows: `Ragged` for lists, arrays for numbers, lists for texts."""
        return {name: own.take(indices) for name, own in self.columns.items()}


class _Chunks(ABC):
    """A column of values of different lengths, kept one after the other, in several chunks."""

    def __init__(self, column: pa.ChunkedArray):
        self.starts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])
        self.chunks = [self.views(chunk) for chunk in column.chunks]

    @abstractmethod
    def views(self, chunk: Any) -> tuple[np.ndarray, Any]:
        """Return the offsets of a chunk's values, int64 [n + 1], and its content."""

    def parts(self, indices: Sequence[int] | np.ndarray) -> Iterator[Any]:
        """Yield the content of some rows."""
        wanted = np.asarray(indices, dtype=np.int64)
        numbers = np.searchsorted(self.starts, wanted, side="right") - 1
        for number, place in zip(numbers.tolist(), (wanted - self.starts[numbers]).tolist(), strict=True):
            offsets, content = self.chunks[number]
            yield content[offsets[place] : offsets[place + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n]."""
        return np.concatenate([np.diff(offsets) for offsets, _ in self.chunks])

    def content(self) -> Iterator[Any]:
        """Yield everything, as bytes-like parts."""
        for offsets, content in self.chunks:
            yield content[offsets[0] : offsets[-1]]


class Lists(_Chunks):
    """Lists of numbers."""

    def views(self, chunk: Any) -> tuple[np.ndarray, Any]:
        """Return offsets and numbers."""
        return chunk.offsets.to_numpy().astype(np.int64), chunk.values.to_numpy()

    def take(self, indices: Sequence[int] | np.ndarray) -> Ragged:
        """Return some rows."""
        found = list(self.parts(indices))
        return Ragged(np.concatenate(found), np.array([len(each) for each in found]))


class Texts(_Chunks):
    """Texts."""

    def views(self, chunk: Any) -> tuple[np.ndarray, Any]:
        """Return offsets and UTF-8."""
        _, offsets, content = chunk.buffers()
        view = np.frombuffer(offsets, dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        return view, memoryview(content or b"")

    def take(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Return some rows."""
        return [str(part, "utf-8") for part in self.parts(indices)]


class Numbers:
    """Numbers, which are in memory."""

    def __init__(self, column: pa.ChunkedArray):
        self.values = column.to_numpy()

    def take(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return some rows."""
        found: np.ndarray = self.values[np.asarray(indices, dtype=np.int64)]
        return found

    @property
    def lengths(self) -> np.ndarray:
        """int64 [1], all in one."""
        return np.array([len(self.values)])

    def content(self) -> Iterator[Any]:
        """Yield everything, as bytes-like parts."""
        yield self.values


def _column_type(kind: pa.DataType) -> type[Lists | Texts | Numbers]:
    return Lists if pa.types.is_list(kind) else Texts if pa.types.is_large_string(kind) else Numbers


def write_arrow(path: Path, blocks: Iterable[Mapping[str, Sequence[Any]]]) -> None:
    """Write one or more blocks of columns to a file as they come; the first decides on their types."""
    rest = iter(blocks)
    first = next(rest)
    schema = pa.schema([(name, _type_of(values)) for name, values in first.items()])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for block in chain([first], rest):
            arrays = [pa.array(block[field.name], field.type) for field in schema]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def _type_of(values: Sequence[Any]) -> pa.DataType:
    value = next((each for each in values if not hasattr(each, "__len__") or len(each)), values[0])
    if isinstance(value, str):
        return pa.large_string()
    if isinstance(value, bool | np.bool_):
        return pa.bool_()
    if isinstance(value, np.ndarray):
        return pa.list_(pa.from_numpy_dtype(value.dtype))
    if hasattr(value, "__len__"):
        return pa.list_(pa.float32() if len(value) and isinstance(value[0], float | np.floating) else pa.int32())
    return pa.float64() if isinstance(value, float) else pa.int64()

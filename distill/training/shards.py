"""The tensor files of a checkpoint, whole or in shards.

The tensors of one name (`model`, `optimizer`, ...) are one file that rank 0 writes, `model.safetensors`; where one of
them is sharded, one file per rank, `model-00000-of-00002.safetensors`: the pieces that this rank holds. The header of
such a file has `pieces`, JSON: name -> [shape of the whole tensor, offset of the piece in it]. Any number of ranks can
read either, each no more than the slices that it needs.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # what DCP itself goes by

from distill.errors import RunError
from distill.files import sha256_of
from distill.models.dtensor import full_tensor, local_shard

TensorsByFile = Mapping[str, Mapping[str, Tensor]]
"""Name of a file without its ending -> the tensors in it. One without tensors is not written."""

FindParameter = Callable[[str, str], Tensor | None]
"""(file, name) -> the parameter that a stored tensor belongs to; one of the same shape is sharded like it."""

Shape = tuple[int, ...]

_SHARD = re.compile(r"(?P<file>.+)-(?P<rank>\d{5})-of-(?P<world>\d{5})\.safetensors")


@dataclass(frozen=True)
class OwnFile:
    """One file of a checkpoint."""

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] | None = None
    written: bool = True
    """False where another rank writes it and this one only takes part in gathering its tensors."""

    @property
    def size(self) -> int:
        """Bytes of its tensors that this rank writes."""
        return sum(tensor.nbytes for tensor in self.tensors.values()) if self.written else 0


def own_files(tensors_by_file: TensorsByFile, rank: int, world: int, *, whole: bool) -> list[OwnFile]:
    """Select what `rank` of `world` has to write of a checkpoint: pieces of sharded files, or all of it on rank 0.

    Args:
        tensors_by_file: Tensors by file, as every rank holds them.
        rank: This one.
        world: Number of ranks.
        whole: Tensors that are sharded are to be gathered, with `gathered`, and not written in pieces.
    """
    files = []
    for name, tensors in tensors_by_file.items():
        if not whole and any(isinstance(tensor, DTensor) for tensor in tensors.values()):
            files.append(_own_pieces(f"{name}-{rank:05d}-of-{world:05d}.safetensors", tensors, rank))
        elif tensors:
            files.append(OwnFile(f"{name}.safetensors", dict(tensors), written=rank == 0))
    return files


def gathered(
    files: Iterable[OwnFile], keep: Callable[[str, str, Tensor], Tensor] = lambda _file, _name, tensor: tensor
) -> list[OwnFile]:
    """Gather one tensor after the other, and keep those that this rank writes. Collective.

    Args:
        files: From `own_files`.
        keep: (file, name, whole tensor or piece) -> what to keep of it.
    """
    kept = []
    for file in files:
        own = {}
        for name, tensor in file.tensors.items():
            tensor = full_tensor(tensor)
            if file.written:
                own[name] = keep(file.name, name, tensor)
        if file.written:
            kept.append(replace(file, tensors=own))
    return kept


def _own_pieces(name: str, tensors: Mapping[str, Tensor], rank: int) -> OwnFile:
    own: dict[str, Tensor] = {}
    where: dict[str, tuple[Shape, Shape]] = {}
    for key, tensor in tensors.items():
        offset: Shape = (0,) * tensor.ndim
        first = rank == 0
        if isinstance(tensor, DTensor):
            at: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
            # Of ranks that hold the same piece, one writes it.
            first = not any(i and p.is_replicate() for i, p in zip(at, tensor.placements, strict=True))
            offset = _share_of(tensor)[1]
        if first:
            own[key], where[key] = local_shard(tensor), (tuple(tensor.shape), offset)
    return OwnFile(name, own, {"pieces": json.dumps(where)})


def _share_of(tensor: DTensor) -> tuple[Shape, Shape]:
    """Return shape and offset of what this rank holds."""
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


def write(folder: Path, files: Iterable[OwnFile]) -> dict[str, str]:
    """Write files; returns the sha256 of each, all of them on the disk by then."""
    paths = []
    for file in files:
        own = {key: tensor.contiguous() for key, tensor in file.tensors.items()}
        save_file(own, folder / file.name, metadata=file.metadata)
        paths.append(folder / file.name)
    with ThreadPoolExecutor(max(1, len(paths))) as pool:  # both wait outside the interpreter's lock
        list(pool.map(_fsync, paths))
        return {path.name: digest for path, digest in zip(paths, pool.map(sha256_of, paths), strict=True)}


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _file_of(name: str) -> str:
    """Strip the ending, and the rank of a shard: `model-00000-of-00002.safetensors` -> `model`."""
    found = _SHARD.fullmatch(name)
    return found["file"] if found else name.removesuffix(".safetensors")


def missing(names: Iterable[str]) -> set[str]:
    """Find the files that must be there beside these: weights, and of shards those of every rank."""
    names = set(names)
    needed = set() if any(_file_of(name) == "model" for name in names) else {"model.safetensors"}
    for name in names:
        if found := _SHARD.fullmatch(name):
            world = int(found["world"])
            needed |= {f"{found['file']}-{rank:05d}-of-{world:05d}.safetensors" for rank in range(world)}
    return needed - names


def read(folder: Path, parameter_of: FindParameter = lambda _file, _name: None) -> dict[str, dict[str, Tensor]]:
    """Read the tensors of a verified checkpoint, written by any number of ranks.

    Args:
        folder: The checkpoint.
        parameter_of: Finds the parameter that a tensor belongs to; of a sharded one only this rank's slice is read.

    Raises:
        RunError: The pieces of a tensor are not all there.
    """
    with ExitStack() as stack:
        pieces_of: dict[str, dict[str, list[_Piece]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, "pt"))
            stored = json.loads((file.metadata() or {}).get("pieces", "{}"))
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                size = tuple(file.get_slice(name).get_shape())
                shape, offset = stored.get(name, (size, (0,) * len(size)))
                piece = _Piece(file, name, size, tuple(shape), tuple(offset))
                pieces_of.setdefault(_file_of(path.name), {}).setdefault(name, []).append(piece)
        return {
            file: {name: _load_like(pieces, parameter_of(file, name)) for name, pieces in tensors.items()}
            for file, tensors in pieces_of.items()
        }


@dataclass(frozen=True)
class _Piece:
    """A stored tensor, of the whole one's `shape` the part of `size` that begins at `offset`."""

    file: Any
    name: str
    size: Shape
    shape: Shape
    offset: Shape

    def read(self, ranges: Sequence[slice] = (slice(0),)) -> Tensor:
        """Read these ranges of it, and nothing else, from the disk."""
        tensor: Tensor = self.file.get_slice(self.name)[tuple(ranges) if self.size else ...]
        return tensor

    def copy_to(self, target: Tensor, offset: Shape) -> int:
        """Copy its overlap with `target`, the part of the whole that begins at `offset`; returns the numbers copied."""
        low = [max(own, other) for own, other in zip(self.offset, offset, strict=True)]
        ends = zip(self.offset, self.size, offset, target.shape, strict=True)
        high = [min(own + size, other + wanted) for own, size, other, wanted in ends]
        if any(start >= stop for start, stop in zip(low, high, strict=True)):
            return 0
        of_own, of_target = (
            [slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True)] for origin in (self.offset, offset)
        )
        target[tuple(of_target)] = self.read(of_own)
        return math.prod(stop - start for start, stop in zip(low, high, strict=True))


def _load_like(pieces: Sequence[_Piece], parameter: Tensor | None) -> Tensor:
    """Put a tensor together: whole, or this rank's shard of it where the parameter is sharded."""
    shape = pieces[0].shape
    if not isinstance(parameter, DTensor) or tuple(parameter.shape) != shape:
        return _assemble(pieces, shape, (0,) * len(shape))
    own = _assemble(pieces, *_share_of(parameter)).to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


def _assemble(pieces: Sequence[_Piece], wanted: Shape, offset: Shape) -> Tensor:
    tensor = pieces[0].read().new_empty(wanted)
    if sum(piece.copy_to(tensor, offset) for piece in pieces) != math.prod(wanted):
        raise RunError(f"pieces of {pieces[0].name} are missing in the checkpoint, or of another shape")
    return tensor

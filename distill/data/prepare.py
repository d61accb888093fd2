"""From the rows of each split to a corpus on disk: tokens, packed where the task allows it, and a summary."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill.data.corpus import Corpus, Examples, save_facts
from distill.data.packing import cut_documents, pack
from distill.data.rows import BLOCK, read_split, split_documents, write_arrow
from distill.data.splits import Split, divide
from distill.data.summary import summarise
from distill.data.tasks.task import Encoder, Features, Ragged, Settled, Task
from distill.errors import InputError
from distill.models.weights import as_input_error
from distill.recipe.schema import Data

FEW_DOCUMENTS = 10
"""With fewer documents, a split by their hashes would leave everything to chance."""
Report = Callable[[str, int, int], None]
"""(split, rows encoded, rows in all), for a progress bar."""


@dataclass(frozen=True)
class Order:
    """All that decides a corpus, and nothing else."""

    task: Task
    spec: Data
    """The recipe's section."""
    tokenizer: Any
    """The teacher's."""
    seed: int
    """Chooses which training rows keep their label."""
    base: Path
    """Folder that relative paths start from."""
    looks: bool = False
    """Something looks at a validation split during training."""
    packs: bool = False
    """The teacher's family can tell documents apart that share a row."""
    own_order: Callable[[Settled], Settled] = lambda settled: settled
    """Puts the classes into the order of a teacher that is already trained. Raises InputError."""


def prepare(order: Order, folder: Path, progress: Report = lambda _split, _done, _all: None) -> Corpus:
    """Read, clean, split and encode the rows of a recipe, into Arrow files and facts in a folder.

    Args:
        order: The task, its rows and the tokenizer.
        folder: Where the corpus goes; it also holds the rows while this runs.
        progress: Gets told how far the encoding is.

    Raises:
        InputError: The rows cannot be read, split or encoded, or are not what the task needs.
    """
    task, spec, tokenizer = order.task, order.spec, order.tokenizer
    limit = tokenizer.model_max_length
    if spec.max_length > limit:
        raise InputError(f"data.max_length: {spec.max_length} is more than the tokenizer's {limit} positions")
    splits = _read_splits(order, folder)
    asked = [name for name, column in task.columns.items() if column.answer and not column.plain]
    labels = {name: sum((own.labels(column) for column in asked), start=Counter()) for name, own in splits.items()}
    settled = order.own_order(task.settle(labels))
    digest = hashlib.sha256(json.dumps([settled.head, settled.classes]).encode())
    parts: dict[str, Examples] = {}
    counts: dict[str, Any] = {}
    for name in order.spec.splits:
        if name in splits:
            encoder = Encoder(tokenizer, spec, settled)
            path, report = folder / f"{name}.arrow", partial(progress, name)
            examples = _encode(task, splits[name], encoder, path, order.packs, report)
            digest.update(f"{name}:{len(examples)}".encode())
            _add_content(digest, examples, task.block)
            parts[name] = examples
            counts[name] = summarise(splits[name], labels[name], settled, encoder, examples)
    corpus = Corpus(task, settled, parts, int(tokenizer.pad_token_id), digest.hexdigest(), counts)
    save_facts(corpus, folder)
    for leftover in (*folder.glob("*.rows.arrow"), *folder.glob("*.parts.arrow"), *folder.glob("*.documents.arrow")):
        leftover.unlink()
    return corpus


def _read_splits(order: Order, folder: Path) -> dict[str, Split]:
    task, spec, seed, looks = order.task, order.spec, order.seed, order.looks
    given = [name for name in spec.splits if spec.origins(name)]
    rows = {name: read_split(name, task, spec, seed, order.base, folder) for name in given}
    if task.divisible and not {"validation", "test"} & {*given} and len(rows["train"]) < FEW_DOCUMENTS:
        rows |= split_documents(rows["train"], task, spec, seed, looks, folder)
    asks = any(column.answer for column in task.columns.values())
    if spec.labelled is not None and not asks:
        raise InputError(f"data.labelled: task: {task.name} has no labels to hide; remove the key")
    return divide(rows, spec, looks and "validation" not in rows, asks)


def _encode(
    task: Task, split: Split, encoder: Encoder, path: Path, packs: bool, progress: Callable[[int, int], None]
) -> Examples:
    """Encode the rows of a split, block by block, into an Arrow file of examples."""

    def blocks() -> Iterator[Features]:
        with as_input_error(f"the tokenizer cannot read the {path.stem} split"):
            for start in range(0, len(split.index), task.block):
                features = _encode_block(task, split, slice(start, start + task.block), encoder)
                if features["labelled"]:
                    yield features
                progress(min(start + task.block, len(split.index)), len(split.index))

    if not task.packed:
        return _write_examples(path, blocks())
    documents = _write_examples(path.with_suffix(".documents.arrow"), blocks())
    return _write_examples(path, _packed(documents, encoder.spec.max_length, packs))


def _encode_block(task: Task, split: Split, part: slice, encoder: Encoder) -> Features:
    index, labelled = split.index[part], split.labelled[part]
    found = split.rows.table[index.tolist()]
    values: dict[str, list[Any]] = {}
    for name, column in task.columns.items():
        if name in found:
            read = found[name] if column.plain else [json.loads(text) for text in found[name]]
            keeps = labelled if column.answer else np.ones(len(index), dtype=bool)
            values[name] = [value if keep else None for value, keep in zip(read, keeps, strict=True)]
    features = task.encode(values, encoder)
    numbers = features.pop("row", range(len(index)))
    return {**features, "row": [part.start + number for number in numbers]}


def _packed(documents: Examples, size: int, packs: bool) -> Iterator[Features]:
    """Put documents, cut to `size`, together into rows; one document a row where the model cannot tell them apart."""
    pieces = cut_documents(documents.lengths, size)
    lengths = pieces[:, 2] - pieces[:, 1]
    rows = pack(lengths, size) if packs else [[piece] for piece in range(len(pieces))]
    for start in range(0, len(rows), BLOCK):
        part = rows[start : start + BLOCK]
        features: Features = {"documents": [lengths[row].tolist() for row in part]}
        for row in part:
            taken = documents.take(pieces[row, 0].tolist())
            for name, values in taken.items():
                joined = values[0] if not isinstance(values, Ragged) else _join(values, pieces[row])
                features.setdefault(name, []).append(joined)
        yield features


def _join(values: Ragged, pieces: np.ndarray) -> np.ndarray:
    parts = [own[start:stop] for own, (_, start, stop) in zip(values, pieces, strict=True)]
    return np.concatenate(parts)


def _write_examples(path: Path, blocks: Iterator[Features]) -> Examples:
    """Write examples as they come; the first block decides the types of the features."""
    first = next(blocks, None)
    if first is None:
        raise InputError(f"data: the {path.name.partition('.')[0]} split has no example")
    schema = pa.schema([(name, _type_of(values)) for name, values in first.items()])
    write_arrow(path, chain([first], blocks), schema)
    return Examples(path)


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


def _add_content(digest: Any, examples: Examples, block: int) -> None:
    """Add every feature of every example to a hash, whatever the blocks they were written in."""
    for name in sorted(examples.table.column_names):
        for start in range(0, len(examples), block):
            content = examples.take(range(start, min(start + block, len(examples))), [name])[name]
            parts = [content.flat, content.lengths] if isinstance(content, Ragged) else [content]
            for part in parts:
                digest.update(part.tobytes() if isinstance(part, np.ndarray) else json.dumps(part).encode())

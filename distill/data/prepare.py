"""From the rows of each split to a corpus on disk: tokens, packed where the task allows it, and a summary."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.arrow import write_arrow
from distill.data.corpus import Corpus, Examples, save_facts
from distill.data.packing import cut_documents, pack
from distill.data.rows import BLOCK, BLOCK_CHARACTERS, Order, read_split, split_documents
from distill.data.sources import list_splits
from distill.data.splits import Split, count_rows, divide
from distill.data.summary import summarise
from distill.data.tasks.task import Encoder, Features, Ragged
from distill.errors import InputError
from distill.models.weights import as_input_error
from distill.recipe.data import SET, Data
from distill.recipe.jsonrows import quote_names

FEW_DOCUMENTS = 10
"""With fewer documents, a split by their hashes would leave everything to chance."""
Report = Callable[[str, int, int], None]
"""(split, rows encoded, rows in all), for a progress bar."""
MISREAD = re.compile("[\x80-\x84\x86-\x9f\ufffd]")
"""Control characters that no one types, and the sign for what could not be read."""


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
    asked = [role for role, column in order.columns.items() if column.answer and not column.plain]
    labels = {name: own.count_labels(asked) for name, own in splits.items()}
    deciding = {name: own for name, own in labels.items() if not name.startswith(SET)}
    try:
        plain = task.settle(deciding, spec)
        settled = order.own_order(plain)
    except InputError as error:
        raise InputError(f"{error} ({count_rows(splits)})") from error
    for name in sorted(labels.keys() - deciding.keys()):
        _check_set(order, name, deciding | {name: labels[name]}, plain.head, {*plain.classes, *settled.classes})
    constants = task.constants(tokenizer, spec)
    digest = hashlib.sha256(json.dumps([settled.head, settled.classes, *sorted(constants.items())]).encode())
    parts: dict[str, Examples] = {}
    sets: dict[str, str] = {}
    counts: dict[str, Any] = {}
    for name in spec.splits:
        if name in splits:
            encoder = Encoder(tokenizer, spec, settled, measured=name != "train", teacher=order.teacher)
            encoder.notes.update(unread_splits(spec, order.base) if name == "train" else {})
            examples = _encode(order, splits[name], encoder, folder / f"{name}.arrow", partial(progress, name))
            if not examples.lengths.any():
                raise InputError(f"data: the tokenizer makes no token of any text of the {name} split")
            content = f"{name}:{_content_of(examples)}"
            if name.startswith(SET):
                sets[name] = content
            else:
                digest.update(content.encode())
            parts[name] = examples
            counts[name] = summarise(splits[name], encoder, examples)
    corpus = Corpus(task, settled, parts, int(tokenizer.pad_token_id), digest.hexdigest(), counts, constants, sets)
    save_facts(corpus, folder)
    for leftover in [file for kind in ("rows", "parts", "documents") for file in folder.glob(f"*.{kind}")]:
        leftover.unlink()
    return corpus


def _check_set(order: Order, name: str, labels: Mapping[str, Counter[str]], head: str, classes: set[str]) -> None:
    """Refuse a set whose labels would change the model: what else is measured decides nothing."""
    key = order.spec.key_of(name)
    try:
        whole = order.task.settle(labels, order.spec)
    except InputError as error:
        raise InputError(f"{key}: with its labels, {error}") from error
    if whole.head != head:
        raise InputError(f"{key}: has labels of another kind than the data: with them, {whole.about}")
    found = {*whole.classes}
    with suppress(InputError):  # the teacher may have been trained for more than the data show
        found = {*order.own_order(whole).classes}
    if more := sorted(found - classes):
        raise InputError(
            f"{key}: the model has no output for {quote_names(more)}, which the rows of data do not have; leave such "
            f"rows out of the set"
        )


def unread_splits(spec: Data, base: Path) -> dict[str, int]:
    """Count the splits of datasets that no key of the recipe reads, in words: one may hold its makers' own test."""
    unread: dict[tuple[str, str | None, str | None], set[str]] = {}
    chosen = [(source, source.split or split) for split in spec.splits for source in spec.origins(split)]
    for source, _ in chosen:
        unread.setdefault((source.source, source.config, source.revision), {*list_splits(source, base)})
    for source, split in chosen:
        unread[source.source, source.config, source.revision].discard(split)
    left = [(Path(key[0]).name, sorted(own)) for key, own in unread.items() if own]
    return {f"splits of {name} that are not read ({', '.join(own)})": len(own) for name, own in left}


def _read_splits(order: Order, folder: Path) -> dict[str, Split]:
    task, spec = order.task, order.spec
    rows = {name: read_split(order, name, folder) for name in spec.splits if spec.origins(name)}
    if task.divisible and not {"validation", "test"} & rows.keys() and len(rows["train"]) < FEW_DOCUMENTS:
        rows |= split_documents(order, rows["train"], folder)
    if spec.labelled is not None and not order.asks:
        raise InputError(f"data.labelled: task: {task.name} has no labels to hide; remove the key")
    return divide(rows, spec, order.looks, order.asks)


def _encode(order: Order, split: Split, encoder: Encoder, path: Path, progress: Callable[[int, int], None]) -> Examples:
    """Encode the rows of a split, block by block, into an Arrow file of examples."""
    task = order.task

    def blocks() -> Iterator[Features]:
        with as_input_error(f"the tokenizer cannot read the {path.stem} split"):
            for part in _blocks(split, task.block):
                features = _encode_block(order, split, part, encoder)
                if features["row"]:  # the task may leave rows out
                    yield features
                progress(part.stop, len(split.index))
        if not encoder.examples:
            reasons = "; ".join(f"{note}: {count}" for note, count in encoder.notes.items())
            raise InputError(f"data: no example is left of the {path.stem} split{reasons and f' ({reasons})'}")

    if not task.packed:
        return _write_examples(path, blocks())
    documents = _write_examples(path.with_suffix(".documents"), blocks())
    return _write_examples(path, _packed(documents, order.spec.max_length, order.packs))


def _encode_block(order: Order, split: Split, part: slice, encoder: Encoder) -> Features:
    task, values, labelled = order.task, split.rows.file.take(split.index[part]), split.labelled[part].tolist()
    given = [name for name, own in task.columns.items() if own.plain or not own.answer]
    texts = [text for name in given for text in values.get(name, ())]
    whole = "\n".join(texts)
    for name in task.columns.keys() & values.keys():
        if not task.columns[name].plain:
            known = {text: json.loads(text) for text in set(values[name])}
            values[name] = [known[text] for text in values[name]]
        if task.columns[name].answer:
            values[name] = [value if keep else None for value, keep in zip(values[name], labelled, strict=True)]
    features = task.encode(values, encoder)
    for token in [token for token in encoder.tokenizer.all_special_tokens if token in whole]:
        encoder.note(f"texts with the special token {token!r} in them", sum(token in text for text in texts))
    if MISREAD.search(whole):
        encoder.note(
            "texts with U+FFFD or U+0080 to U+009F in them, as a wrong encoding leaves them (cp1252, not latin-1?)",
            sum(bool(MISREAD.search(text)) for text in texts),
        )
    numbers = features.pop("row", range(len(labelled)))
    if order.routes:
        routes = [order.routes[source.source] for source in split.rows.sources]
        origins = split.rows.origins[split.index[part]]
        features["route"] = [routes[origins[number]] for number in numbers]
    return {**features, "row": [part.start + number for number in numbers]}


def _blocks(split: Split, size: int) -> Iterator[slice]:
    """Cut the rows of a split into blocks of so many rows, or fewer where their texts are long."""
    lengths = np.sum([column.lengths for column in split.rows.file.columns.values()], axis=0)
    ends = np.cumsum(lengths[split.index])
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = min(start + size, max(start + 1, int(np.searchsorted(ends, before + BLOCK_CHARACTERS))))
        yield slice(start, min(stop, len(ends)))
        start = stop


def _packed(documents: Examples, size: int, packs: bool) -> Iterator[Features]:
    """Put documents, cut to `size`, together into rows; one document a row where the model cannot tell them apart."""
    pieces = cut_documents(documents.lengths, size)
    lengths = pieces[:, 2] - pieces[:, 1]
    rows = _rows_of(documents, pieces, size) if packs else [[piece] for piece in range(len(pieces))]
    for start in range(0, len(rows), BLOCK):
        part = rows[start : start + BLOCK]
        features: Features = {"documents": [lengths[row].tolist() for row in part]}
        for row in part:
            taken = documents.take(pieces[row, 0].tolist())
            for name, values in taken.items():
                joined = values[0] if not isinstance(values, Ragged) else _join(values, pieces[row])
                features.setdefault(name, []).append(joined)
        yield features


def _rows_of(documents: Examples, pieces: np.ndarray, size: int) -> list[list[int]]:
    """Pack pieces of documents into rows; where documents have routes, each row is of one."""
    lengths = pieces[:, 2] - pieces[:, 1]
    if "route" not in documents.columns:
        return pack(lengths, size)
    routes: Any = documents.take(pieces[:, 0])["route"]
    parts = [np.flatnonzero(routes == route) for route in np.unique(routes)]
    return [part[row].tolist() for part in parts for row in pack(lengths[part], size)]


def _join(values: Ragged, pieces: np.ndarray) -> np.ndarray:
    parts = [own[start:stop] for own, (_, start, stop) in zip(values, pieces, strict=True)]
    return np.concatenate(parts)


def _write_examples(path: Path, blocks: Iterator[Features]) -> Examples:
    write_arrow(path, blocks)
    return Examples(path)


def _content_of(examples: Examples) -> str:
    """Hash every feature of every example, whatever the blocks they were written in."""
    digest = hashlib.sha256()
    for name, column in sorted(examples.columns.items()):
        own = hashlib.sha256(column.lengths.tobytes())
        for part in column.content():
            own.update(part)
        digest.update(f"{name}:{own.hexdigest()}".encode())
    return digest.hexdigest()

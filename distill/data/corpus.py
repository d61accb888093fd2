"""From a source to two fixed sets of token ids: train and test, with few or all labels kept.

The split and the choice of labelled examples depend on the texts' hashes, never on their order in a file. A corpus is
saved once and read back memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from distill.data.sources import SOURCES, read_rows
from distill.data.tasks import TASKS, Task
from distill.errors import InputError
from distill.models.forward import UNLABELLED
from distill.models.weights import as_input_error
from distill.recipe.locate import data_file
from distill.recipe.schema import Data
from distill.registry import find

SPLITS = ("train", "test")
ARRAYS = ("flat", "offsets", "labels")
"""Fields of `Examples`, in their order, as a saved corpus names them."""


@dataclass(frozen=True)
class Examples:
    """Token ids and labels of one split; `examples[i]` are the ids of one example, int32 [L_i]."""

    flat: np.ndarray
    """int32 [Σ L_i] token ids, special tokens included, example after example; they may lie in a file."""
    offsets: np.ndarray
    """int64 [n + 1], where each example begins; the last is where the last one ends."""
    labels: np.ndarray
    """int64 [n] class per example, -100 where unlabelled; for token tasks the tokens are their own labels."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [n] tokens per example."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Corpus:
    """Both splits, ready for batching."""

    task: Task
    train: Examples
    test: Examples
    classes: tuple[str, ...]
    """Class names by index; empty for token tasks."""
    padding: int
    """Token id that fills short rows; never looked at, the attention mask hides it."""
    fingerprint: str
    """sha256 over every token id, label and the split."""

    @property
    def labelled(self) -> Sequence[int]:
        """Training examples that have a label."""
        if self.task.head == "next_token":
            return range(len(self.train))
        return np.flatnonzero(self.train.labels != UNLABELLED).tolist()


@dataclass(frozen=True)
class Texts:
    """The split texts before tokenisation; enough to know the task's classes."""

    task: Task
    train: list[tuple[str, str | None]]
    test: list[tuple[str, str | None]]
    classes: tuple[str, ...]


def read_texts(spec: Data, seed: int, base: Path) -> Texts:
    """Read, de-duplicate, split, and hide the labels that the recipe does not give.

    Args:
        spec: The recipe's section.
        seed: Chooses which training examples keep their label.
        base: The folder that relative paths start from (the recipe's).

    Raises:
        InputError: The source cannot be read, a split is empty, or the task needs labels that are not there.
    """
    task = find(TASKS, spec.task, "task")()
    rows = _rows(spec, base)
    train = [row for row in rows if not _is_test(row[0], spec.test_share)]
    test = [row for row in rows if _is_test(row[0], spec.test_share)]
    if not train or not test:
        raise InputError(f"data: {len(rows)} examples split into {len(train)} for training and {len(test)} for testing")
    if task.head == "next_token":
        if spec.labelled is not None:
            raise InputError("data.labelled: a causal language model has no labels to hide; remove the key")
        return Texts(task, train, test, ())
    test = [row for row in test if row[1] is not None]
    if not test:
        raise InputError("data: no example of the test split has a label")
    classes = tuple(sorted({label for _, label in [*train, *test] if label is not None}))
    if len(classes) < 2:
        raise InputError(f"data: classification needs two or more classes, found {list(classes)}")
    return Texts(task, _hide_labels(train, spec.labelled, seed), test, classes)


def _rows(spec: Data, base: Path) -> list[tuple[str, str | None]]:
    file = data_file(spec.source, base)
    dataset = read_rows(file, spec.text, spec.label) if file else find(SOURCES, spec.source, "data source")()
    rows = dict(zip(reversed(dataset["text"]), reversed(dataset["label"]), strict=True))  # the first of equals wins
    ordered = sorted(rows.items(), key=lambda row: _hash(row[0]))
    return ordered[: spec.limit]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _is_test(text: str, share: float) -> bool:
    # Another hash than the one that orders the rows, so that `limit` does not cut into one split only.
    return int(_hash("split:" + text)[:8], 16) < share * 2**32


def _hide_labels(
    rows: Sequence[tuple[str, str | None]], labelled: int | None, seed: int
) -> list[tuple[str, str | None]]:
    if labelled is None:
        return list(rows)
    candidates = sorted((text for text, label in rows if label is not None), key=lambda text: _hash(f"{seed}:{text}"))
    if labelled > len(candidates):
        raise InputError(f"data.labelled: {labelled} labels asked, the training split has {len(candidates)}")
    keep = set(candidates[:labelled])
    return [(text, label if text in keep else None) for text, label in rows]


def tokenise(texts: Texts, spec: Data, tokenizer: Any) -> Corpus:
    """Turn both splits into token ids. Raises InputError when nothing is left, or the tokenizer fails."""
    limit = tokenizer.model_max_length
    if spec.max_length > limit:
        raise InputError(f"data.max_length: {spec.max_length} is more than the tokenizer's {limit} positions")
    splits: dict[str, Examples] = {}
    index = dict(zip([None, *texts.classes], [UNLABELLED, *range(len(texts.classes))], strict=True))
    for name, rows in (("train", texts.train), ("test", texts.test)):
        with as_input_error(f"the tokenizer cannot read the {name} split"):
            tokens = texts.task.encode([text for text, _ in rows], tokenizer, spec.max_length)
        if not tokens:
            raise InputError(f"data.max_length: the {name} split has less text than one block of {spec.max_length}")
        labels = [index[label] for _, label in rows] if texts.classes else [UNLABELLED] * len(tokens)
        offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
        splits[name] = Examples(np.concatenate(tokens), offsets, np.array(labels, dtype=np.int64))
    padding, fingerprint = int(tokenizer.pad_token_id), _corpus_fingerprint(splits, texts.classes)
    return Corpus(texts.task, splits["train"], splits["test"], texts.classes, padding, fingerprint)


def _corpus_fingerprint(splits: dict[str, Examples], classes: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps([*classes]).encode())
    for name, examples in sorted(splits.items()):
        digest.update(f"{name}:{len(examples)}".encode())
        digest.update(examples.lengths.tobytes() + examples.labels.tobytes() + examples.flat.tobytes())
    return digest.hexdigest()


def save_corpus(corpus: Corpus, path: Path) -> None:
    """Write a corpus as one safetensors file; what is no array stands in its header."""
    arrays = {f"{split}.{name}": getattr(getattr(corpus, split), name) for split in SPLITS for name in ARRAYS}
    facts = {"classes": corpus.classes, "padding": corpus.padding, "fingerprint": corpus.fingerprint}
    save_file(arrays, path, metadata={"corpus": json.dumps(facts)})


def load_corpus(path: Path, task: Task) -> Corpus:
    """Read what `save_corpus` wrote; token ids stay in the file until they are looked at.

    Raises:
        InputError: The file is not a corpus.
    """
    try:
        with safe_open(path, framework="pt") as file:  # maps the file into memory
            facts = json.loads(file.metadata()["corpus"])
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        train, test = (Examples(*(arrays[f"{split}.{name}"] for name in ARRAYS)) for split in SPLITS)
        return Corpus(task, train, test, tuple(facts["classes"]), facts["padding"], facts["fingerprint"])
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise InputError(f"{path} is not a tokenised corpus: {error}") from error

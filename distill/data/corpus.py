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

from distill.data.sources import SOURCES, read_file
from distill.data.tasks import TASKS, Task
from distill.errors import InputError
from distill.models.forward import UNLABELLED
from distill.models.weights import as_input_error
from distill.recipe.locate import data_file
from distill.recipe.schema import Data
from distill.registry import find

SPLITS = ("train", "test")


@dataclass(frozen=True)
class TokenRows(Sequence[np.ndarray]):
    """Rows of token ids of different lengths in one array, which may lie in a file."""

    flat: np.ndarray
    """int32 [Σ L_i], row after row."""
    offsets: np.ndarray
    """int64 [n + 1], where each row begins; the last is where the last one ends."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.flat[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class Examples:
    """Token ids and labels of one split."""

    tokens: Sequence[np.ndarray]
    """int32 [L_i] per example, special tokens included."""
    labels: np.ndarray
    """int64 [n] class per example, -100 where unlabelled; for token tasks the tokens are their own labels."""

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [n] tokens per example."""
        if isinstance(self.tokens, TokenRows):
            return np.diff(self.tokens.offsets)
        return np.array([len(tokens) for tokens in self.tokens], dtype=np.int64)


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
    dataset = read_file(file, spec.text, spec.label) if file else find(SOURCES, spec.source, "data source")()
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
    splits = {}
    for name, rows in (("train", texts.train), ("test", texts.test)):
        with as_input_error(f"the tokenizer cannot read the {name} split"):
            tokens = texts.task.encode([text for text, _ in rows], tokenizer, spec.max_length)
        index = {label: number for number, label in enumerate(texts.classes)}
        labels = [UNLABELLED if label is None else index[label] for _, label in rows] if texts.classes else []
        if not tokens:
            raise InputError(f"data.max_length: the {name} split has less text than one block of {spec.max_length}")
        padded = labels or [UNLABELLED] * len(tokens)
        splits[name] = Examples(tokens, np.array(padded, dtype=np.int64))
    return Corpus(
        task=texts.task,
        train=splits["train"],
        test=splits["test"],
        classes=texts.classes,
        padding=int(tokenizer.pad_token_id),
        fingerprint=_fingerprint(splits, texts.classes),
    )


def _fingerprint(splits: dict[str, Examples], classes: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps([*classes]).encode())
    for name, examples in sorted(splits.items()):
        digest.update(f"{name}:{len(examples)}".encode())
        digest.update(examples.lengths.tobytes() + examples.labels.tobytes())
        for tokens in examples.tokens:
            digest.update(tokens.tobytes())
    return digest.hexdigest()


def save_corpus(corpus: Corpus, path: Path) -> None:
    """Write a corpus as one safetensors file; what is no array stands in its header."""
    arrays: dict[str, np.ndarray] = {}
    for name in SPLITS:
        examples: Examples = getattr(corpus, name)
        offsets = np.concatenate([[0], np.cumsum(examples.lengths)]).astype(np.int64)
        arrays |= {f"{name}.flat": np.concatenate(examples.tokens), f"{name}.offsets": offsets}
        arrays[f"{name}.labels"] = examples.labels
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
        splits = {
            name: Examples(TokenRows(arrays[f"{name}.flat"], arrays[f"{name}.offsets"]), arrays[f"{name}.labels"])
            for name in SPLITS
        }
        classes, padding, fingerprint = tuple(facts["classes"]), facts["padding"], facts["fingerprint"]
        return Corpus(task, splits["train"], splits["test"], classes, padding, fingerprint)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise InputError(f"{path} is not a tokenised corpus: {error}") from error

"""A task, i.e. a kind of prediction: its columns, labels, tokens, batches, head and metrics.

One file of this folder is one task. What it does not say it takes from `Task`: a text, cut to length, alone in its row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from distill.errors import InputError
from distill.models.forward import UNLABELLED, Batch, Outputs
from distill.models.sentence import SentenceHead, sentence_head
from distill.recipe.names import TASK_METRICS
from distill.recipe.schema import Data

Values = Mapping[str, Sequence[Any]]
"""Column of the task -> its values, one per row; None for a label that is hidden or not there. `place` says where each
row comes from, for messages."""
Seeds = Sequence[tuple[int, ...]]
"""For each example the numbers that its random draws follow from: in training the seed of the recipe, the step and the
example; in evaluations the example alone."""
Features = dict[str, list[Any]]
"""Name -> one entry per example: a number, a list of numbers, or text. `input_ids` and `labelled` are always there."""


@dataclass(frozen=True)
class Column:
    """A column that a task reads."""

    read: Callable[[Any], Any]
    """(value of the file) -> value of the task, as JSON has it. Raises ValueError that says what is wrong with it."""
    answer: bool = False
    """It is asked for, not given to the model: rows that differ in nothing else contradict each other."""
    plain: bool = False
    """Its values are text, kept as they are; of other columns JSON is kept."""
    content: Callable[[Any], str] | None = None
    """Its values are paths of files, from the folder of the data file on. (path) -> hash of what is in the file, by
    which equal rows are known and splits are drawn, wherever the files lie."""


def read_text(value: Any) -> str:
    """Accept text; nothing at all is an empty text."""
    if value is not None and not isinstance(value, str):
        raise ValueError("is no text")
    return value or ""


TEXT = Column(read_text, plain=True)


@dataclass(frozen=True)
class Settled:
    """Facts that the labels of all splits decide."""

    head: str
    """The kind of predictions, a name from `distill.losses.PREDICTION_KINDS`."""
    classes: tuple[str, ...] = ()
    """Class names by index; empty where the model has no classes of its own."""
    about: str = ""
    """What the labels are, in words; empty where a task has only one kind."""
    may_lack_answers: bool = False
    """Some questions have no answer, so that a model may give none."""


@dataclass
class Encoder:
    """A tokenizer at work for a task, and the counts of what it cut or did not know."""

    tokenizer: Any
    spec: Data
    settled: Settled
    measured: bool = False
    """The examples are measured, not trained on, so that features for metrics are wanted."""
    truncated: int = 0
    """Examples that were cut."""
    tokens: int = 0
    unknown: int = 0
    """Tokens that stand for what the tokenizer does not know."""
    examples: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    """Labels that examples have, by class."""
    notes: Counter[str] = field(default_factory=Counter)
    """Other things that happened -> how often."""
    teacher: Path | None = None
    """Folder of the teacher; None where none is at hand."""

    @cached_property
    def unknown_id(self) -> int | None:
        """Id of unknown text; None where the tokenizer can write everything, or uses the token for something else."""
        found = self.tokenizer.unk_token_id
        return None if found in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id) else found

    @cached_property
    def sentence(self) -> SentenceHead:
        """Prompts and lengths of the teacher's sentence embeddings."""
        return sentence_head(self.teacher) if self.teacher else SentenceHead()

    def __call__(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> dict[str, list[list[int]]]:
        """Encode texts, or pairs of them, with special tokens, each cut to `max_length`.

        Returns:
            `input_ids`, and `token_type_ids` where pairs need them, one list per text.
        """
        given = {"text": list(texts)} if pairs is None else {"text": list(texts), "text_pair": list(pairs)}
        encoded, cut = self._encode(given, self.spec.max_length)
        self.truncated += cut
        self.count(encoded["input_ids"])
        bare = self.around(len(given))
        self.note("texts of which the tokenizer writes nothing", sum(len(ids) <= bare for ids in encoded["input_ids"]))
        return {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}

    def around(self, texts: int = 1) -> int:
        """Count the tokens around a text, or two. Raises InputError where `max_length` leaves no room for others."""
        count = len(self.tokenizer(*[[""]] * texts)["input_ids"][0])
        if self.spec.max_length <= count:
            raise InputError(f"data.max_length: the tokenizer writes {count} tokens around any text; give it more room")
        return count

    def targets(self, texts: Sequence[str], limit: int) -> tuple[list[list[int]], int]:
        """Encode texts that a decoder is to write, each cut to `limit`; returns their ids and how many were cut."""
        encoded, cut = self._encode({"text_target": list(texts)}, limit)
        self._count_tokens(encoded["input_ids"])
        return encoded["input_ids"], cut

    def _encode(self, given: Mapping[str, list[str]], limit: int) -> tuple[Any, int]:
        """Encode texts, cut to `limit` tokens, and count those that were cut."""
        kinds = None if "text_pair" in given else False  # of tokens; the tokenizer knows whether pairs have them
        own = {"return_attention_mask": False, "return_token_type_ids": kinds}
        encoded = self.tokenizer(**given, truncation=True, max_length=limit, **own)
        full = [row for row, ids in enumerate(encoded["input_ids"]) if len(ids) >= limit]
        if full and encoded.encodings:
            return encoded, sum(bool(encoded.encodings[row].overflowing) for row in full)
        if not full:
            return encoded, 0
        parts = {name: [texts[row] for row in full] for name, texts in given.items()}
        whole = self.tokenizer(**parts, verbose=False)["input_ids"]
        return encoded, sum(len(ids) > limit for ids in whole)

    def features(self, examples: Sequence[Mapping[str, Any]]) -> Features:
        """List the features of examples that are given one by one, and count their tokens."""
        names = examples[0] if examples else ("input_ids", "labelled", "row")
        found = {name: [each[name] for each in examples] for name in names}
        self.count(found["input_ids"])
        return found

    def note(self, what: str, count: int = 1) -> None:
        """Count what happened to rows or examples, for the summary, if it happened at all."""
        if count:
            self.notes[what] += int(count)

    def count(self, rows: Sequence[Sequence[int]]) -> None:
        """Count examples, their tokens, and the unknown ones among these."""
        self.examples += len(rows)
        self._count_tokens(rows)

    def _count_tokens(self, rows: Sequence[Sequence[int]]) -> None:
        self.tokens += sum(map(len, rows))
        if self.unknown_id is not None:
            self.unknown += sum(list(ids).count(self.unknown_id) for ids in rows)


def fitting_size(length: int, sizes: Sequence[int]) -> int:
    """Return the first of some ascending sizes that is at least `length`; `length` where none is."""
    return next((size for size in sizes if size >= length), length)


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths: the entries of one feature for some examples."""

    flat: np.ndarray
    lengths: np.ndarray
    """int64 [B]"""
    sizes: tuple[int, ...] = ()
    """Lengths, ascending, to the first of which that is long enough rows are padded; else to the longest of them."""

    @classmethod
    def of(cls, rows: Sequence[torch.Tensor], sizes: tuple[int, ...]) -> Ragged:
        """Join token ids [L] of each row."""
        return cls(torch.cat(list(rows)).numpy(), np.array([len(row) for row in rows]), sizes)

    @cached_property
    def mask(self) -> np.ndarray:
        """Where padded rows have an entry, boolean [B, L]."""
        longest = int(self.lengths.max(initial=0))
        found: np.ndarray = np.arange(fitting_size(longest, self.sizes)) < self.lengths[:, None]
        return found

    def pad(self, value: int) -> np.ndarray:
        """Pad on the right, int64 [B, L]."""
        padded = np.full(self.mask.shape, value, dtype=np.int64)
        padded[self.mask] = self.flat
        return padded

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(np.split(self.flat, np.cumsum(self.lengths)[:-1]))


class Task:
    """One kind of prediction. Subclasses fill the attributes and replace the methods that differ."""

    name: ClassVar[str]
    auto_class: ClassVar[str]
    """Name of the transformers Auto class with its head."""
    head: ClassVar[str]
    """The kind of predictions, a name from `distill.losses.PREDICTION_KINDS`; `settle` may find another."""
    columns: ClassVar[Mapping[str, Column]] = {"text": TEXT}
    metrics: ClassVar[Sequence[str]]
    """Metrics that it has; see `metrics_for`. Those of a task of this package are listed in `distill.recipe.names`."""
    observed: ClassVar[tuple[str, ...]] = ()
    """Columns that `observe` adds to the predictions."""
    observed_in_training: ClassVar[bool] = False
    """`observe` is quick, so that looks at the validation split during training do it too."""
    added_tokens: ClassVar[tuple[str, ...]] = ()
    """Special tokens that the task writes into its texts. A tokenizer that lacks them gets them, and the teacher
    embeddings for them, which its fit trains."""
    sample: ClassVar[tuple[str, ...]] = ("Some text.",)
    """What the model card gives to the tokenizer: a text, or a pair of texts."""
    packed: ClassVar[bool] = False
    """Texts longer than a row are cut into several, and several texts may share a row, where the teacher's family can
    tell them apart."""
    divisible: ClassVar[bool] = False
    """A text is prose that may be split into a part for training and one for the test."""
    draws: ClassVar[bool] = False
    """`collate` draws at random, so that an example is another input at each step."""
    block: ClassVar[int] = 1000
    """Rows that are encoded at once."""
    target: ClassVar[str] = "input_ids"
    """Feature with the token ids that a decoder is to write."""
    prompted: ClassVar[bool] = False
    """A batch tells prompts and answers apart, so that a model may write answers of its own; see `prompts`."""
    preprocessors: Sequence[Any] = ()
    """Whatever else turns rows into what the model reads, and is saved beside it: each has `save_pretrained`."""

    def __init_subclass__(cls) -> None:
        """Take the metrics from the list, unless the class names or inherits its own."""
        if vars(cls).get("name") in TASK_METRICS:
            cls.metrics = vars(cls).get("metrics", TASK_METRICS[cls.name])  # type: ignore[index]

    def bind(self, _teacher: Path, _tokenizer: Any, _spec: Data) -> Task:
        """Return the task with what it needs of the teacher's folder to encode, collate and observe.

        Raises:
            InputError: The folder lacks it.
        """
        return self

    def vocabulary(self, tokenizer: Any) -> int:
        """Count the tokens that a model may predict."""
        return len(tokenizer)

    def settle(self, _labels: Mapping[str, Counter[str]], _spec: Data) -> Settled:
        """Decide on head and classes from split -> label, as JSON -> number of rows. Raises InputError."""
        return Settled(self.head)

    def metrics_for(self, _head: str) -> Sequence[str]:
        """Choose the metrics measured unless the recipe says otherwise; the first one stands in headlines."""
        return self.metrics

    def model_settings(self, _settled: Settled) -> dict[str, Any]:
        """Return what the config of a model for this task must say, beside its classes."""
        return {}

    def check_row(self, values: dict[str, Any]) -> dict[str, Any]:
        """Judge the values of one row together, and complete them. Raises ValueError that says what is wrong."""
        return values

    def constants(self, _tokenizer: Any, _spec: Data) -> dict[str, Any]:
        """Return, as JSON, what `collate` needs to know of the tokenizer and the recipe beside the features."""
        return {}

    def encode(self, rows: Values, encoder: Encoder) -> Features:
        """Turn rows into examples. One that gives several, or none, adds `row`, the number of each one's row."""
        return {**encoder(rows["text"]), "labelled": [True] * len(rows["text"])}

    def collate(self, examples: Mapping[str, Any], padding: int, _seeds: Seeds) -> Batch:
        """Make a batch of examples: input_ids, attention_mask [B, L], and of a feature `label` labels [B] or [B, L].

        Args:
            examples: Feature -> `Ragged`, an array, or a list of texts; and the `constants` by name.
            padding: Token id that fills short rows.
            _seeds: Of each example, for what is drawn at random.
        """
        ids: Ragged = examples["input_ids"]
        batch = {"input_ids": ids.pad(padding), "attention_mask": ids.mask.astype(np.int64)}
        if "token_type_ids" in examples:
            batch["token_type_ids"] = examples["token_type_ids"].pad(0)
        if "label" in examples:
            given = examples["label"]
            batch["labels"] = given.pad(UNLABELLED) if isinstance(given, Ragged) else given
            if batch["labels"].dtype.kind == "f":
                batch["labels"] = batch["labels"].astype(np.float32)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def prompts(self, _batch: Batch) -> list[torch.Tensor | None]:
        """Take the tokens [L] that each answer of a batch is written for; None where nothing stands before one."""
        raise NotImplementedError(f"{self.name} is not prompted")

    def with_answers(self, prompts: Sequence[torch.Tensor], answers: Sequence[torch.Tensor], **given: Any) -> Batch:
        """Make a batch of prompts and other answers to them, as `collate` does: one row for each.

        Args:
            prompts: Token ids [L] of each.
            answers: Token ids [T] of each.
            given: `padding` and `sizes`, as for `collate` and `Ragged`.
        """
        raise NotImplementedError(f"{self.name} is not prompted")

    def observe(self, _model: Any, _outputs: Outputs, _batch: Batch, _examples: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns `observed` for a batch, one entry per example, from what a model said about it."""
        return {}

    def finish(self, columns: Mapping[str, np.ndarray], _settled: Settled) -> Mapping[str, np.ndarray]:
        """Turn the columns of a whole split, one entry per example, into those that the metrics read."""
        return columns

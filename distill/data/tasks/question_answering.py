"""Answers to questions, as spans of a context; a long context is read in windows that overlap."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
import torch

from distill.data.tasks.task import TEXT, Column, Encoder, Features, Seeds, Settled, Task, Values
from distill.errors import InputError
from distill.models.forward import UNLABELLED, Batch, Outputs
from distill.recipe.schema import Data

LONGEST_ANSWER = 30
"""Tokens that an answer has at most, as in the scripts of transformers."""
Window = tuple[dict[str, list[int]], np.ndarray]
"""Ids by name, and for each token the characters [start, end) of the context, or -1: int32 [L, 2]."""
Answers = list[list[Any]]
"""[text, start] each; [text, start, occurrences] where the file says no start."""


def read_answers(value: Any) -> Answers | None:
    """Accept `{text: [...], answer_start: [...]}`, a list of `{text, start}`, or a text; an empty list: no answer."""
    if isinstance(value, str):
        value = _parse_answers(value)
    if value is None or value == "":
        return None
    if isinstance(value, dict):
        value = _rows_of(value)
    elif isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise ValueError("is neither a text, a list of answers nor an object with text and answer_start")
    return [_read_answer(each) for each in value]


def _parse_answers(text: str) -> Any:
    """Read the JSON of a list or an object, as CSV files have it; other text is an answer itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    items = value if isinstance(value, list) else [value]
    return value if isinstance(value, dict | list) and all(isinstance(each, dict | str) for each in items) else text


def _rows_of(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Turn an object of lists into a list of objects."""
    _check_keys(value)
    lists = {key: each if isinstance(each, list) else [each] for key, each in value.items()}
    if len({len(each) for each in lists.values()}) > 1:
        counts = " and ".join(f"{len(each)} of {key}" for key, each in lists.items())
        raise ValueError(f"has lists of different lengths, {counts}")
    return [dict(zip(lists, each, strict=True)) for each in zip(*lists.values(), strict=True)]


def _read_answer(value: Any) -> list[Any]:
    given = {"text": value} if isinstance(value, str) else value
    if not isinstance(given, dict):
        raise ValueError("has an answer that is neither a text nor an object with text and answer_start")
    _check_keys(given)
    text, start = given.get("text"), given.get("answer_start", given.get("start"))
    if not isinstance(text, str) or not text.strip():
        raise ValueError("has an answer without text; an empty list says that there is no answer")
    if start is not None and type(start) is not int:
        raise ValueError(f"has an answer_start that is no whole number, {start!r}")
    return [text, start]


def _check_keys(value: dict[str, Any]) -> None:
    if not {"text"} <= value.keys() <= {"text", "start", "answer_start"}:
        raise ValueError(f"has {', '.join(value) or 'nothing'} where text and answer_start must be")


class QuestionAnswering(Task):
    """The labels of a window are the tokens at which the answer starts and ends: the [CLS] token where it has none."""

    name = "question_answering"
    auto_class = "AutoModelForQuestionAnswering"
    head = "span"
    columns: ClassVar = {"question": TEXT, "context": TEXT, "answers": Column(read_answers, answer=True)}
    observed = ("row", "answers", "answer_score", "null_score", "gold")
    observed_in_training = True
    block = 100  # each row may have many windows
    sample = ("Who wrote the program?", "Ada wrote the program in 1843.")

    def settle(self, labels: Mapping[str, Counter[str]], _spec: Data) -> Settled:
        """See whether some questions have no answer."""
        counts: Counter[str] = sum(labels.values(), Counter())
        if {*counts} == {"[]"}:
            raise InputError("data: no question has an answer, so there is nothing to learn; check data.columns")
        return Settled(self.head, may_lack_answers="[]" in counts)

    def model_settings(self, _settled: Settled) -> dict[str, Any]:
        """Ask for two outputs per token: a teacher may come from a task with more classes."""
        return {"num_labels": 2}

    def check_row(self, values: dict[str, Any]) -> dict[str, Any]:
        """Find answers in their context, and refuse those that are not where the file says."""
        if values["answers"] is None:
            return values
        context = values["context"]
        return {**values, "answers": [_locate(text, start, context) for text, start in values["answers"]]}

    def encode(self, rows: Values, encoder: Encoder) -> Features:
        """Encode questions with their contexts, in windows that share `data.stride` tokens."""
        limit, tokenizer = encoder.spec.max_length, encoder.tokenizer
        if not tokenizer.is_fast:
            raise InputError(
                f"task: {self.name} needs to know which characters a token stands for, and the teacher's tokenizer "
                f"({type(tokenizer).__name__}) is a slow one, which does not tell"
            )
        stride = limit // 4 if encoder.spec.stride is None else encoder.spec.stride
        taken = limit - tokenizer.num_special_tokens_to_add(pair=True) - stride
        questions = tokenizer(list(rows["question"]), add_special_tokens=False, verbose=False)["input_ids"]
        fitting = [row for row, ids in enumerate(questions) if len(ids) < taken]
        encoder.note("rows left out: the question leaves no room for the context", len(questions) - len(fitting))
        examples = [
            {**window, "row": row}
            for row, windows in _windows(tokenizer, rows, fitting, limit, stride)
            for window in _label(windows, rows["context"][row], rows["answers"][row], encoder)
        ]
        return encoder.features(examples)

    def collate(self, examples: Mapping[str, Any], padding: int, seeds: Seeds) -> Batch:
        """Add the tokens at which each answer starts and ends, [B, 2]."""
        labels = torch.from_numpy(examples["span"].flat.astype(np.int64).reshape(-1, 2))
        return {**super().collate(examples, padding, seeds), "labels": labels}

    def observe(self, _model: Any, outputs: Outputs, _batch: Batch, examples: Mapping[str, Any]) -> dict[str, Any]:
        """Find the best answer within each window, its score, and that of no answer: the [CLS] token."""
        assert outputs.logits is not None, "the head of answers gives logits"
        start, end = outputs.logits.float().cpu().numpy().transpose(1, 0, 2)
        inside = examples["starts"].pad(-1) >= 0
        first, last, score = best_spans(start, end, inside)
        rows = np.arange(len(first))
        places = (examples["starts"].pad(-1)[rows, first], examples["ends"].pad(-1)[rows, last])
        texts = zip(examples["text"], *(each.tolist() for each in places), strict=True)
        return {
            "row": examples["row"],
            "answers": [text[begin:stop].strip() for text, begin, stop in texts],
            "answer_score": score,
            "null_score": start[rows, examples["null_at"]] + end[rows, examples["null_at"]],
            "gold": examples["gold"],
        }

    def finish(self, columns: Mapping[str, np.ndarray], settled: Settled) -> Mapping[str, np.ndarray]:
        """Join the windows of each row: the best answer of any, unless every window rather gives none; sums add up."""
        row, score = columns["row"], columns["answer_score"]
        _, first = np.unique(row, return_index=True)
        order = np.lexsort((-score, row))
        best = order[np.unique(row[order], return_index=True)[1]]
        null_score = np.minimum.reduceat(columns["null_score"], first)
        answers = columns["answers"][best]
        if settled.may_lack_answers:
            answers = np.where(null_score > score[best], "", answers)
        chosen = {"answers": answers, "answer_score": score[best], "null_score": null_score}
        same = {name: columns[name][first] for name in ("example", "row", "gold")}
        sums = {name: np.add.reduceat(own, first) for name, own in columns.items() if name not in {*chosen, *same}}
        return {**same, **chosen, **sums}


def _locate(text: str, start: int | None, context: str) -> list[Any]:
    if start is None:
        if text not in context:
            fix = "a list or an object must be JSON" if text[0] in "[{" else "an empty list says that there is none"
            raise ValueError(f"the answer {text[:60]!r} is not in the context; {fix}")
        return [text, context.index(text), context.count(text)]
    found = context[start : start + len(text)] if start >= 0 else ""
    if found != text:
        where = context.find(text)
        hint = f", which is at {where}" if where >= 0 else ", which is not in the context"
        raise ValueError(f"answer_start {start} says {found[:60]!r}, not the answer {text[:60]!r}{hint}")
    return [text, start]


def _windows(
    tokenizer: Any, rows: Values, fitting: Sequence[int], limit: int, stride: int
) -> Iterator[tuple[int, list[Window]]]:
    """Yield each row's number and windows."""
    if not fitting:
        return
    found = tokenizer(
        [rows["question"][row] for row in fitting],
        [rows["context"][row] for row in fitting],
        truncation="only_second",
        max_length=limit,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    for number, group in groupby(range(len(found["input_ids"])), found["overflow_to_sample_mapping"].__getitem__):
        yield fitting[number], [_window(found, index) for index in group]


def _window(found: Any, index: int) -> Window:
    ids = {name: found[name][index] for name in ("input_ids", "token_type_ids") if name in found}
    inside = np.array([side == 1 for side in found.sequence_ids(index)])
    return ids, np.where(inside[:, None], np.array(found["offset_mapping"][index]), -1).astype(np.int32)


def _label(
    windows: Sequence[Window], context: str, answers: Answers | None, encoder: Encoder
) -> Iterator[dict[str, Any]]:
    """Turn the windows of one row into examples; none where there is nothing to find an answer in."""
    if not all((spans >= 0).any() for _, spans in windows):
        encoder.note("rows left out: the tokenizer writes nothing of the context")
        return
    wanted = _trim(answers[0][0], answers[0][1]) if answers else None
    tokens = [_overlapping(spans, *wanted) if wanted else np.array([]) for _, spans in windows]
    if wanted and not any(map(len, tokens)):
        encoder.note("rows left out: the tokenizer writes nothing of the answer")
        return
    held, exact = False, True
    for number, ((ids, spans), own) in enumerate(zip(windows, tokens, strict=True)):
        inside = spans[:, 0] >= 0
        start = 0 if number == 0 else int(spans[inside, 0][0])
        stop = len(context) if number == len(windows) - 1 else int(spans[inside, 1][-1])
        null_at = _null_position(ids["input_ids"], encoder.tokenizer)
        span = [UNLABELLED] * 2 if answers is None else [null_at] * 2
        if wanted and start <= wanted[0] and wanted[1] <= stop and len(own):
            span, held = [int(own[0]), int(own[-1])], True
            exact = context[spans[own[0], 0] : spans[own[-1], 1]].strip() == context[slice(*wanted)]
        yield {
            **ids,
            "starts": np.where(inside, spans[:, 0] - start, -1),
            "ends": np.where(inside, spans[:, 1] - start, -1),
            "null_at": null_at,
            "text": context[start:stop],
            "gold": json.dumps([each[0] for each in answers or ()], ensure_ascii=False),
            "span": span,
            "labelled": answers is not None,
        }
    places = next((each[2] for each in answers or () if len(each) == 3), 0)
    encoder.note("contexts read in several windows", len(windows) > 1)
    untaught = "" if encoder.settled.may_lack_answers else ", which the model gives never, as no other split has any"
    encoder.note(f"questions without an answer{untaught}", answers == [])
    encoder.note("questions with several answers: the first is learned, and any is right", len(answers or ()) > 1)
    encoder.note("answers that begin or end inside a token, never given exactly", not exact)
    encoder.note("answers without their place: the first one in the context is taken", places > 0)
    encoder.note("of these, answers that stand there several times", places > 1)
    encoder.note("answers that no window holds whole: a larger data.stride would", bool(wanted) and not held)
    longest = max(map(len, tokens))
    encoder.note(f"answers of more than {LONGEST_ANSWER} tokens, never given whole", longest > LONGEST_ANSWER)


def _trim(text: str, start: int) -> tuple[int, int]:
    """Return the characters [first, stop) of an answer without the space around it."""
    return start + len(text) - len(text.lstrip()), start + len(text.rstrip())


def _overlapping(spans: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Find the tokens that stand for any of the characters [start, stop)."""
    return np.flatnonzero((spans[:, 0] < stop) & (spans[:, 1] > start) & (spans[:, 0] >= 0))


def _null_position(ids: Sequence[int], tokenizer: Any) -> int:
    """Find the token that stands for no answer: the class token, else the start token, else the first one."""
    marks = (tokenizer.cls_token_id, tokenizer.bos_token_id)
    return next((list(ids).index(mark) for mark in marks if mark is not None and mark in ids), 0)


def best_spans(start: np.ndarray, end: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the span of at most `LONGEST_ANSWER` tokens with the highest sum of scores, in each window.

    Args:
        start: Scores of each token as the first one, [B, L].
        end: Scores of each token as the last one, [B, L].
        inside: Tokens of the context, boolean [B, L].

    Returns:
        First token, last token and score of each span, [B] each.
    """
    start, end = (np.where(inside, scores, -np.inf) for scores in (start, end))
    padded = np.pad(end, ((0, 0), (0, LONGEST_ANSWER - 1)), constant_values=-np.inf)
    ends = np.lib.stride_tricks.sliding_window_view(padded, LONGEST_ANSWER, axis=1)
    sums = (start[:, :, None] + ends).reshape(len(start), -1)
    best = sums.argmax(axis=1)
    first, further = np.divmod(best, LONGEST_ANSWER)
    return first, first + further, sums[np.arange(len(best)), best]

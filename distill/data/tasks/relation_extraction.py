"""The relation between two spans of a text, which markers point out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from distill.data.tasks.classes import check_count, class_numbers, order_classes
from distill.data.tasks.spans import SPLIT_WORD, splits_word
from distill.data.tasks.task import TEXT, Column, Encoder, Features, Settled, Task, Values
from distill.errors import InputError
from distill.models.forward import UNLABELLED, Batch, Outputs
from distill.recipe.schema import Data

MARKERS = {"head": ("[E1]", "[/E1]"), "tail": ("[E2]", "[/E2]")}
NO_RELATION = ("none", "no_relation", "no relation", "na", "other")
"""Names, in small letters, of the class of pairs without a relation."""


def read_span(value: Any) -> list[int]:
    """Accept characters as [start, end] or {start, end}, also as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError("is no span, [start, end]") from error
    if isinstance(value, dict) and value.keys() == {"start", "end"}:
        value = [value["start"], value["end"]]
    if not isinstance(value, list) or [type(each) for each in value] != [int, int]:
        raise ValueError("is no span, [start, end] or {start, end} in characters")
    return value


def read_relation(value: Any) -> str | None:
    """Accept a class: text or a whole number; nothing at all: no label."""
    if value is not None and type(value) not in (str, int):
        raise ValueError("is no class: neither text nor a whole number")
    return None if value is None or not str(value).strip() else str(value)


class RelationExtraction(Task):
    """A text with markers around head and tail, and one class for it."""

    name = "relation_extraction"
    auto_class = "AutoModelForSequenceClassification"
    head = "sequence"
    columns: ClassVar = {
        "text": TEXT,
        "head": Column(read_span),
        "tail": Column(read_span),
        "relation": Column(read_relation, answer=True),
    }
    observed = ("none_class",)
    observed_in_training = True
    added_tokens = (*MARKERS["head"], *MARKERS["tail"])
    sample = ("[E1] Marie Curie [/E1] was born in [E2] Warsaw [/E2].",)

    def settle(self, labels: Mapping[str, Counter[str]], spec: Data) -> Settled:
        """Take every relation as a class."""
        counts: Counter[str] = sum(labels.values(), Counter())
        names = order_classes([*map(json.loads, counts)], spec.classes)
        check_count(names, counts.total(), spec.classes)
        return Settled(self.head, names, f"{len(names)} relations")

    def check_row(self, values: dict[str, Any]) -> dict[str, Any]:
        """Refuse spans that are not in the text or overlap, and texts that hold markers already."""
        text, spans = values["text"], sorted(values[side] for side in MARKERS)
        for side in MARKERS:
            start, end = values[side]
            if not 0 <= start < end <= len(text):
                raise ValueError(f"{side} [{start}, {end}] is no span of a text of {len(text)} characters")
            if not text[start:end].strip():
                raise ValueError(f"{side} [{start}, {end}] holds nothing but space")
        if spans[1][0] < spans[0][1]:
            both = " and ".join(f"{side} {values[side]} {text[slice(*values[side])][:40]!r}" for side in MARKERS)
            raise ValueError(f"{both} overlap")
        if found := [marker for marker in self.added_tokens if marker in text]:
            raise ValueError(f"the text holds {found[0]}, which would mark a span; take it out")
        return values

    def encode(self, rows: Values, encoder: Encoder) -> Features:
        """Encode the texts with markers; what is too long is cut around the two spans."""
        texts = [mark(*each) for each in zip(rows["text"], rows["head"], rows["tail"], strict=True)]
        whole = encoder.tokenizer(texts, verbose=False)["input_ids"]
        if not all(_marker_ids(encoder.tokenizer) <= {*own} for own in whole):
            raise InputError(f"the teacher's tokenizer takes the markers {', '.join(self.added_tokens)} apart")
        ids = [_cut(own, text, encoder) for own, text in zip(whole, texts, strict=True)]
        kept = [row for row, own in enumerate(ids) if own]
        encoder.count([ids[row] for row in kept])
        encoder.note("rows left out: max_length does not reach from one span to the other", len(ids) - len(kept))
        encoder.note(
            SPLIT_WORD, sum(splits_word(rows["text"][row], *rows[side][row]) for row in kept for side in MARKERS)
        )
        classes, number_of = encoder.settled.classes, class_numbers(encoder.settled.classes)
        given = [rows["relation"][row] for row in kept]
        labels = [UNLABELLED if relation is None else number_of(relation) for relation in given]
        encoder.classes.update(classes[label] for label in labels if label != UNLABELLED)
        none = find_none_class(classes, encoder.spec.none_class)
        if none is not None:
            note = f"rows without a relation, of the class {classes[none]!r}, which f1_relations leaves out"
            encoder.note(note, labels.count(none))
        return {
            "input_ids": [ids[row] for row in kept],
            "label": labels,
            "labelled": [label != UNLABELLED for label in labels],
            "none_class": [UNLABELLED if none is None else none] * len(kept),
            "row": kept,
        }

    def observe(self, _model: Any, _outputs: Outputs, _batch: Batch, examples: Mapping[str, Any]) -> dict[str, Any]:
        """Hand the class on that stands for no relation."""
        return {"none_class": examples["none_class"]}


def mark(text: str, head: Sequence[int], tail: Sequence[int]) -> str:
    """Write the markers around two spans that do not overlap, set off by spaces where the text has any.

    >>> mark("Ada met Mary.", [8, 12], [0, 3])
    '[E2] Ada [/E2] met [E1] Mary [/E1].'
    """
    space = " " if any(letter.isspace() for letter in text) else ""
    for (start, end), (opening, closing) in sorted(zip((head, tail), MARKERS.values(), strict=True), reverse=True):
        text = f"{text[:start]}{opening}{space}{text[start:end]}{space}{closing}{text[end:]}"
    return text


def find_none_class(classes: Sequence[str], name: str | None) -> int | None:
    """Find the class of pairs without a relation, by its name or as one of `NO_RELATION`; None where there is none.

    Raises:
        InputError: There is no class of that name, or several have one of the usual names.
    """
    found = [index for index, each in enumerate(classes) if name in (None, each)]
    if name is None:
        found = [index for index in found if classes[index].lower() in NO_RELATION]
        if len(found) > 1:
            names = " and ".join(classes[index] for index in found)
            raise InputError(
                f"data: {names} may both stand for no relation; name one, as in data.none_class: {classes[found[0]]}"
            )
    elif name and not found:
        raise InputError(f"data.none_class: there is no class {name!r}; there are {', '.join(classes)}")
    return found[0] if found else None


def _marker_ids(tokenizer: Any) -> set[int]:
    return {tokenizer.convert_tokens_to_ids(marker) for pair in MARKERS.values() for marker in pair}


def _cut(ids: Sequence[int], text: str, encoder: Encoder) -> Sequence[int]:
    """Cut the tokens of a marked text to `max_length`, around its markers; none where these are too far apart."""
    spare = encoder.spec.max_length - len(ids)
    if spare >= 0:
        return ids
    tokenizer = encoder.tokenizer
    own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    # What the tokenizer writes around every text stays.
    before = next(at for at in range(len(ids)) if list(ids[at : at + len(own)]) == list(own))
    room, markers = len(own) + spare, _marker_ids(tokenizer)
    places = [place for place, token in enumerate(own) if token in markers]
    first, beyond = places[0], places[-1] + 1
    if beyond - first > room:
        return []
    encoder.truncated += 1
    start = max(0, min(first - (room - (beyond - first)) // 2, len(own) - room))
    return [*ids[:before], *own[start : start + room], *ids[before + len(own) :]]

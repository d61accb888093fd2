"""A tag for each word, as in named-entity recognition: words with tags, or texts with spans.

Words are put together to a text as people write it, so that the tokenizer sees in training what it will see later, and
its offsets lead back to the words: the first token of a word has its tag, the others have none. Of texts with spans
each token has a tag of its own, whatever the script.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from distill.data.tasks.classes import are_numbers, class_numbers, foreign_kind, order_classes
from distill.data.tasks.spans import SPLIT_WORD, UNSPACED, splits_word
from distill.data.tasks.task import TEXT, Column, Encoder, Features, Settled, Task, Values
from distill.errors import InputError
from distill.models.forward import UNLABELLED, Batch, Outputs
from distill.recipe.jsonrows import list_names
from distill.recipe.names import columns_read
from distill.recipe.schema import Data

OUTSIDE = "O"
TAG = re.compile(r"([BIESLU])-(.+)", re.DOTALL)
"""Beginning, inside, end and single of BIOES; last and unit of BILOU, which are the same."""
Place = tuple[int, int]
"""Start and end in a text."""


def read_tokens(value: Any) -> list[str]:
    """Accept a list of words, or its JSON; nothing at all is an empty list."""
    words = _parse_list(value)
    if not all(isinstance(word, str) for word in words or ()):
        raise ValueError("is no list of words")
    return words or []


def read_tags(value: Any) -> list[str | int | None] | None:
    """Accept a list of tags, or its JSON: names or class numbers, null for a word without one; empty: no labels."""
    tags = [None if isinstance(tag, str) and not tag.strip() else tag for tag in _parse_list(value) or ()]
    if not all(tag is None or type(tag) in (str, int) for tag in tags):
        raise ValueError("is no list of tags: each is a name or a class number")
    return tags if any(tag is not None for tag in tags) else None


def read_spans(value: Any) -> list[list[Any]] | None:
    """Accept a list of spans, {start, end, label} or [start, end, label], or its JSON; returns a list of the latter.

    Start and end count characters from 0, and the end is the first one behind the span. Where a span has a `text`, it
    comes behind the label.
    """
    given = _parse_list(value)
    if given is None:
        return None
    keys = ("start", "end", "label", "text")
    spans: list[Any] = [[*map(span.get, keys)] if isinstance(span, dict) else span for span in given]
    for span in spans:
        if not isinstance(span, list) or [type(part) for part in span[:3]] != [int, int, str] or len(span) > 4:
            raise ValueError("is no list of spans: each is {start, end, label} with two whole numbers and a name")
        if not 0 <= span[0] < span[1] or not span[2]:
            raise ValueError(f"has the span {span[:3]}, which has no character or no name")
    spans.sort(key=lambda span: span[:3])
    for one, other in pairwise(spans):
        if other[0] < one[1]:
            raise ValueError(f"has spans that overlap, {one} and {other}; a token has one tag")
    return spans


def _parse_list(value: Any) -> list[Any] | None:
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"is no list as JSON ({error})") from error
    if value is None or value == "":
        return None
    if not isinstance(value, list):
        raise ValueError("is no list")
    return value


class TokenClassification(Task):
    """A tag for the first token of each word, or for each token of a text with spans."""

    name = "token_classification"
    auto_class = "AutoModelForTokenClassification"
    head = "token"
    columns: ClassVar = {
        "tokens": Column(read_tokens),
        "tags": Column(read_tags, answer=True),
        "text": TEXT,
        "spans": Column(read_spans, answer=True),
    }
    observed = ("entities_found", "entities_predicted", "entities_true", "entity_pairs")
    observed_in_training = True

    def check_row(self, values: dict[str, Any]) -> dict[str, Any]:
        """Refuse a row without a tag for each word, or with a span that leaves the text."""
        words, tags = values.get("tokens", []), values.get("tags")
        if tags is not None and len(tags) != len(words):
            raise ValueError(f"has {len(words)} tokens and {len(tags)} tags")
        text, spans = values.get("text", ""), values.get("spans") or []
        if spans and spans[-1][1] > len(text):
            raise ValueError(f"the span {spans[-1][:3]} leaves the text, which has {len(text)} characters")
        for start, end, _, *own in spans:
            if own and own[0] not in (None, text[start:end]):
                raise ValueError(f"the span [{start}, {end}] is {text[start:end]!r}, and its own text says {own[0]!r}")
        return {**values, "spans": [span[:3] for span in spans]} if spans else values

    def settle(self, labels: Mapping[str, Counter[str]], spec: Data) -> Settled:
        """Collect the tags; of spans each label makes a tag B- and a tag I-."""
        counts: Counter[str] = sum(labels.values(), Counter())
        items = [item for text in counts for item in json.loads(text) if item is not None]
        if "spans" in columns_read(self.name, self.columns, spec.columns):
            classes = _tags_of_spans(sorted({label for _, _, label in items}), spec.classes)
        else:
            if len({type(tag) for tag in items}) > 1:
                raise InputError("data: some tags are names and others numbers; write them alike")
            if spec.classes is None and (any(isinstance(tag, int) for tag in items) or (items and are_numbers(items))):
                raise InputError(
                    "data: the tags are numbers without names; write the names under data, number 0 first, e.g. "
                    "classes: [O, B-PER, I-PER]"
                )
            classes = order_classes(set(items), spec.classes)
            if spec.classes is None:
                classes = tuple(sorted(classes, key=lambda tag: (tag != OUTSIDE, tag)))
        if len(classes) < 2:
            raise InputError(f"data: token_classification needs two or more tags, found {list(classes)}")
        tagged = any(map(TAG.fullmatch, classes))
        kinds = "" if tagged else ", none with B- or I- in front: words in a row with one tag are one span"
        if not tagged and (kind := foreign_kind([tag for tag in classes if tag.upper() != OUTSIDE])):
            raise InputError(
                f"data: the tags {list_names(classes)} say in another form where a span begins; write B-{kind} and "
                f"I-{kind}, and {OUTSIDE} for what is in none"
            )
        outside = "" if OUTSIDE in classes else f", none called {OUTSIDE}: every word is part of a span"
        return Settled("token", classes, f"{len(classes)} tags, {list_names(classes)}{kinds}{outside}")

    def encode(self, rows: Values, encoder: Encoder) -> Features:
        """Encode texts, cut to length, and give tags to their tokens."""
        tokenizer, limit = encoder.tokenizer, encoder.spec.max_length
        if not tokenizer.is_fast:
            raise InputError(
                f"{type(tokenizer).__name__} does not say where its tokens are in a text, which tags need; the teacher "
                f"needs a tokenizer.json"
            )
        encoder.around()
        words = [join_words(each) for each in rows["tokens"]] if "tokens" in rows else None
        texts, answers = ([text for text, _ in words], "tags") if words is not None else (list(rows["text"]), "spans")
        encoded = tokenizer(texts, truncation=True, max_length=limit, return_offsets_mapping=True)
        encoder.count(encoded["input_ids"])
        tagger = _Tagger(encoder)
        labels: list[list[int]] = []
        for row, (text, offsets) in enumerate(zip(texts, encoded["offset_mapping"], strict=True)):
            places = [_without_spaces(text, start, end) for start, end in offsets]
            seen = max((place[1] for place in places if place), default=0)
            cut = len(text.rstrip()) if seen < len(text.rstrip()) and len(offsets) >= limit else None
            encoder.truncated += cut is not None
            answer = rows[answers][row]
            if answer is None:
                labels.append([UNLABELLED] * len(places))
            elif words is not None:
                labels.append(tagger.tag_words(places, words[row][1], answer, cut and seen))
            else:
                labels.append(tagger.tag_spans(text, places, answer, cut and seen))
        labelled = [any(label != UNLABELLED for label in each) for each in labels]
        return {"input_ids": encoded["input_ids"], "label": labels, "labelled": labelled}

    def observe(self, model: Any, outputs: Outputs, batch: Batch, _examples: Mapping[str, Any]) -> dict[str, Any]:
        """Count spans: those predicted, the true ones, and those that are both; and pair their types."""
        assert outputs.logits is not None, "a head of classes gives logits"
        names = model.config.id2label
        columns: dict[str, list[Any]] = {name: [] for name in self.observed}
        for predicted, labels in zip(outputs.logits.argmax(-1).tolist(), batch["labels"].tolist(), strict=True):
            pairs = [(ours, true) for ours, true in zip(predicted, labels, strict=True) if true != UNLABELLED]
            ours, true = ({*spans_of([names[pair[side]] for pair in pairs])} for side in (0, 1))
            pairs_found = json.dumps(pair_spans(ours, true))
            for name, own in zip(self.observed, (len(ours & true), len(ours), len(true), pairs_found), strict=True):
                columns[name].append(own)
        return columns


class _Tagger:
    """Gives the tags of words or spans to tokens, and counts what did not find one."""

    def __init__(self, encoder: Encoder):
        self.encoder, self.classes = encoder, encoder.settled.classes
        self.number_of = class_numbers(self.classes)
        self.begins = any(name.startswith("B-") for name in self.classes)

    def tag_words(
        self, places: Sequence[Place | None], words: Sequence[Place], tags: Sequence[Any], cut: int | None
    ) -> list[int]:
        """Give each word's tag to its first token; `cut` is the end of what is left of a text that is too long."""
        first: dict[int, int] = {}
        ends = [end for _, end in words]
        for token, place in enumerate(places):
            if place:
                word = bisect_right(ends, place[0])  # the first one that ends behind the start of the token
                if word < len(words) and words[word][0] < place[1]:
                    first.setdefault(word, token)
        lost = [start for number, (start, _) in enumerate(words) if number not in first]
        beyond = sum(cut is not None and start >= cut for start in lost)
        self.encoder.note("words beyond max_length", beyond)
        self.encoder.note("words without a token of their own", len(lost) - beyond)
        names = [None if tag is None else self.classes[self.number_of(tag)] for tag in tags]
        if self.begins:
            self.encoder.note("spans that begin with I- and not with B-", count_strays(names))
        return self._labels(len(places), {token: names[number] for number, token in first.items()})

    def tag_spans(
        self, text: str, places: Sequence[Place | None], spans: Sequence[tuple[int, int, str]], cut: int | None
    ) -> list[int]:
        """Give each token the tag of the span that it is in."""
        tags: dict[int, str | None] = {token: OUTSIDE for token, place in enumerate(places) if place}
        for start, end, kind in spans:
            inside = [(token, place) for token, place in enumerate(places) if place and tags[token] == OUTSIDE]
            own = [(token, place) for token, place in inside if place[0] < end and place[1] > start]
            for number, (token, _) in enumerate(own):
                tags[token] = choose_tag(kind, number == 0, number == len(own) - 1, self.classes)
            beyond = cut is not None and end > cut
            self.encoder.note("spans cut at max_length", beyond)
            self.encoder.note("spans without a token of their own", not own and not beyond)
            split = bool(own) and (own[0][1][0] < start or own[-1][1][1] > end)
            self.encoder.note("spans that begin or end inside a token", split)
            self.encoder.note(SPLIT_WORD, splits_word(text, start, end))
        return self._labels(len(places), tags)

    def _labels(self, length: int, tags: Mapping[int, str | None]) -> list[int]:
        labels = [UNLABELLED] * length
        for token, tag in tags.items():
            if tag is not None:
                labels[token] = self.number_of(tag)
                self.encoder.classes[tag] += 1
        return labels


def join_words(words: Sequence[str]) -> tuple[str, list[Place]]:
    """Write words as a text, with spaces except between scripts that have none, and where each of them is in it."""
    text, places = "", []
    for word in words:
        if text and not (UNSPACED.fullmatch(text[-1]) and UNSPACED.match(word)):
            text += " "
        places.append((len(text), len(text) + len(word)))
        text += word
    return text, places


def _without_spaces(text: str, start: int, end: int) -> Place | None:
    """Trim the place of a token to what is no space; None for special tokens and those of spaces alone."""
    own = text[start:end]
    start += len(own) - len(own.lstrip())
    return (start, start + len(own.strip())) if own.strip() else None


def _tags_of_spans(kinds: Sequence[str], stated: Sequence[Any] | None) -> tuple[str, ...]:
    if stated is None:
        if not kinds:
            raise InputError("data: no text has a span")
        return (OUTSIDE, *(f"{place}-{kind}" for kind in kinds for place in "BI"))
    classes = tuple(str(each) for each in stated)
    if OUTSIDE not in classes:
        raise InputError(f"data.classes: has no {OUTSIDE}, the tag of what is in no span")
    for kind in kinds:
        for first in (True, False):
            choose_tag(kind, first, False, classes)
    return classes


def choose_tag(kind: str, first: bool, last: bool, classes: Collection[str]) -> str:
    """Choose the tag of a token in a span, of those that there are: BIO, BIOES, BILOU, I- alone or plain.

    Raises:
        InputError: None fits.
    """
    places = "SUBI" if first and last else "BI" if first else "ELI" if last else "I"
    for tag in (*(f"{place}-{kind}" for place in places), kind):
        if tag in classes:
            return tag
    raise InputError(f"data: there is no tag for spans called {kind!r} among {list_names(classes)}")


def split_tag(tag: str | None) -> tuple[str, str | None]:
    """Split a tag into its place and its kind; a plain tag is inside of a span of its own name."""
    if tag in (None, OUTSIDE):
        return "", None
    found = TAG.fullmatch(str(tag))
    return (found[1], found[2]) if found else ("I", tag)


def spans_of(tags: Sequence[str | None]) -> list[tuple[str, int, int]]:
    """Find the spans that tags stand for: kind, first and last position.

    As seqeval does unless it is told to be strict: a span begins with B- or S-, after E- or S-, or wherever the kind
    changes, so that an I- without a B- begins one as well.
    """
    found: list[tuple[str, int, int]] = []
    kind, start, ended = None, 0, True
    for position, tag in enumerate([*tags, OUTSIDE]):
        place, own = split_tag(tag)
        if ended or own != kind or place in ("B", "S", "U"):
            if kind is not None:
                found.append((kind, start, position - 1))
            kind, start = own, position
        ended = place in ("E", "S", "L", "U")
    return found


def pair_spans(
    predicted: Collection[tuple[str, int, int]], true: Collection[tuple[str, int, int]]
) -> list[tuple[str | None, str | None]]:
    """Pair the types [true, predicted] of spans with the same ends; None stands for a span that is not there."""
    found, wanted = ({(first, last): kind for kind, first, last in side} for side in (predicted, true))
    return [(wanted.get(ends), found.get(ends)) for ends in sorted({*found, *wanted})]


def count_strays(tags: Sequence[str | None]) -> int:
    """Count the spans whose first tag says that they began before."""
    return sum(split_tag(tags[start])[0] in ("I", "E", "L") for _, start, _ in spans_of(tags))

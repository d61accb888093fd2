"""The items of `losses` in a recipe: matches, their losses and keys, and schedules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

from pydantic import StrictBool

from distill.recipe.fields import Fraction, Index, Mistake, NonNegative, Params, Positive, Section
from distill.recipe.names import UNNORMALIZED, AnyLoss, AttentionLoss, HiddenLoss, LogitLoss, RelationLoss, TaskName
from distill.registry import is_reference, suggest


class TermKeys(NamedTuple):
    """Keys of a loss term beside `match`, `weight` and `schedule`."""

    keys: tuple[str, ...]
    losses: tuple[str, ...] = ()
    """Built-in losses; the first is the default."""
    tasks: tuple[str, ...] = get_args(TaskName)
    """Tasks whose head has what is compared."""


Stack = Literal["encoder", "decoder"]
"""Of an encoder-decoder."""
TERM_KEYS = {
    "labels": TermKeys(()),
    "logits": TermKeys(("loss", "temperature", "scale_by_temperature", "params"), get_args(LogitLoss)),
    "hidden": TermKeys(("loss", "map", "stack", "params"), get_args(HiddenLoss)),
    "embeddings": TermKeys(("loss", "stack", "params"), get_args(HiddenLoss)),
    "attention": TermKeys(("loss", "map", "params"), get_args(AttentionLoss)),
    "relations": TermKeys(("loss", "map", "params"), get_args(RelationLoss)),
    "output": TermKeys(("loss", "params"), get_args(HiddenLoss), tasks=("embedding",)),
}
"""`match` -> keys, losses and tasks."""


class Schedule(Section):
    """Change of a term in the course of training, from its own numbers to those given here."""

    weight: NonNegative | None = None
    """The weight at the end, e.g. 0 for a term that only helps at the start."""
    temperature: Positive | None = None
    """The temperature at the end."""
    params: Params = {}
    """Numeric parameters of the loss at the end, e.g. `{beta: 0.9}`; the term gives their first value."""
    start: Fraction = 0.0
    """Share of the steps before which nothing changes."""
    end: Fraction = 1.0
    """Share of the steps after which nothing changes any more."""
    shape: Literal["linear", "cosine"] = "linear"
    """Curve from the first value to the last."""

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse a schedule that changes nothing, or ends before it starts."""
        if self.weight is None and self.temperature is None and not self.params:
            yield Mistake((), "changes nothing", "give the weight, temperature or params at the end", at="key")
        if self.start > self.end:
            message = f"start {self.start:g} comes after end {self.end:g}"
            yield Mistake(("start",), message, "give shares with start ≤ end")


class Term(Section):
    """One term of the training loss."""

    match: Literal["labels", "logits", "hidden", "embeddings", "attention", "relations", "output"]
    """Target of the student: true labels, or of the teacher: its logits, its hidden states after the mapped
    layers or before the first one (`embeddings`), the attention probabilities or the relations within queries, keys and
    values of mapped layers, or its sentence embedding (`output`)."""
    weight: NonNegative = 1.0
    """Factor of this term's mean."""
    loss: AnyLoss | None = None
    """`logits`: forward_kl (null) to tail_aware_kl; `hidden`, `embeddings` and `output`: mse (null) to relative_mse;
    `attention`: kl (null) or mse; `relations`: qkv (null) or values; or `package.module:function`."""
    temperature: Positive = 1.0
    """Softens student and teacher logits."""
    scale_by_temperature: StrictBool = True
    """Multiply by temperature², so that gradients keep their size (Hinton et al. 2015)."""
    map: Literal["plan", "span", "even", "last"] | list[tuple[Index, Index]] = "plan"
    """Layers that are compared: `plan` (each kept layer with the teacher layer it came from), `span` (each kept layer
    with the last teacher layer before the next kept one), `even` (spread over the teacher), `last`, or [student,
    teacher] pairs."""
    stack: Stack | None = None
    """Stack of an encoder-decoder whose states are compared, at the positions that it reads; null: the mean of both.
    Attention and relations are those within the decoder."""
    params: Params = {}
    """Keyword arguments of the loss, e.g. `{beta: 0.5}` for `jsd`."""
    schedule: Schedule | None = None
    """Change of weight, temperature and parameters in the course of training; null: none."""

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse keys that mean nothing for what the term matches, and losses and parameters that do not exist."""
        match = TERM_KEYS[self.match]
        for key in self.changed(*type(self).model_fields):
            if key not in (*match.keys, "match", "weight", "schedule"):
                others = " and ".join(f"match: {other}" for other, row in TERM_KEYS.items() if key in row.keys)
                yield from self.without_effect((key,), f" with match: {self.match}", f"remove it; it is for {others}")
        if match.losses:
            yield from self._wrong_loss(self.loss or match.losses[0], match.losses)
        if "map" in match.keys and not isinstance(self.map, str):
            if not self.map:
                yield Mistake(("map",), "the list maps no layer", "give [student, teacher] pairs, or write plan")
            yield from self.repeated("map", "the pair {}")
        if self.schedule and self.schedule.temperature is not None and "temperature" not in match.keys:
            message, fix = f"has no effect with match: {self.match}", "remove it; it is for match: logits"
            yield Mistake(("schedule", "temperature"), message, fix, at="key")
        for name, end in self.schedule.params.items() if self.schedule else ():
            if not {type(end), type(self.params.get(name))} <= {int, float}:
                message = "needs a number here, and one to start from in the params of the term"
                yield Mistake(("schedule", "params", name), message)

    def beyond_top_k(self, k: int) -> Iterator[Mistake]:
        """Refuse a loss that needs more of the teacher than its k most likely tokens and the mass of all others."""
        own = self.params.get("k", 1)
        if self.match == "logits" and self.loss in UNNORMALIZED:
            message = f"{self.loss} compares logits, and teacher.cache.keep: topk has probabilities"
            yield Mistake(("loss",), message, "write keep: hidden, or loss: forward_kl")
        elif self.loss == "tail_aware_kl" and isinstance(own, int) and own >= k:
            message = f"its k of {own} leaves no token for the tail: teacher.cache.k keeps {k}"
            yield Mistake(("loss",), message, f"write a teacher.cache.k above {own}, or keep: hidden")

    def _wrong_loss(self, loss: str, losses: tuple[str, ...]) -> Iterator[Mistake]:
        if loss not in losses and not is_reference(loss):
            message, fix = f"match: {self.match} has no loss {loss!r}", f"The options are {', '.join(losses)}"
            yield Mistake(("loss",), message, f"{suggest(loss, losses)}{fix}")
            return
        reserved = {"temperature": "temperature"} if self.match == "logits" else {}
        yield from self.wrong_params("loss", loss, reserved=reserved)

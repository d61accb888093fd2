"""The things that a term can match, one row each, which terms, objective, captures, trial and model card read.

A new match is one row of `MATCHES` here, and its keys and its name in `distill.recipe.terms`.

N valid positions, n of them in a block, B examples, L positions, V classes or vocabulary, D columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import InputError
from distill.losses.align import Positions
from distill.losses.hidden import HIDDEN
from distill.losses.kinds import PREDICTION_KINDS, Mask, PredictionKind
from distill.losses.logits import LOGITS
from distill.losses.relation import ATTENTION, RELATION
from distill.models.attention import relation_widths
from distill.models.family import layers_of
from distill.models.forward import Batch, Outputs
from distill.models.topk import TopK, with_tail

Loss = Callable[..., Tensor]
Pair = tuple[int, int]
"""(student layer, teacher layer)"""
EXAMPLE_POSITIONS = 2


class MicroBatch:
    """One micro-batch, the outputs of both models for it, and its valid positions.

    Indexing with a mask looks for its positions each time, again in the backward pass, and each time the host waits
    for the device. Here every mask is looked at once, however many tensors it selects from, and not at all where its
    positions came with the batch (`Objective.locate`).
    """

    def __init__(
        self, kind: PredictionKind, batch: Batch, student: Outputs, teacher: Outputs | None, projections: nn.ModuleDict
    ):
        self.kind, self.batch, self.projections = kind, batch, projections
        self.student: Any = student
        self.teacher: Any = teacher
        """None where no term reads it."""
        self._found: dict[Callable[[Batch], Tensor], Positions] = {}

    def positions(self, mask: Mask) -> Positions:
        """Find the positions of a mask."""
        if (key := located(mask)) in self.batch:
            axes = self.kind.raw_labels(self.batch).ndim if mask in ("labelled", "predicted") else 2
            return Positions(self.batch[key], axes)
        function = getattr(self.kind, mask)
        if mask == "states" and "learned" not in self.batch:
            function = self.kind.tokens  # often those that predict as well, and then looked at once
        if function not in self._found:
            self._found[function] = Positions.of(function(self.batch))
        return self._found[function]

    @cached_property
    def visible(self) -> Tensor:
        """Mask of the keys (last axis) that a query (second axis) may attend to, boolean [B, L, L]."""
        real = self.kind.tokens(self.batch)
        visible = real[:, None, :] & real[:, :, None]
        if self.kind.causal:
            visible = visible.tril()
        if "document_ids" in self.batch:
            documents = self.batch["document_ids"]
            visible = visible & (documents[:, None] == documents[:, :, None])
        return visible


def located(mask: Mask) -> str:
    """Name the entry of a batch that has the positions of a mask, int64 [N] into the flattened mask."""
    return f"{mask}_at"


def _example_vectors(draw: Callable[..., Tensor], columns: int) -> tuple[Any, ...]:
    return draw(EXAMPLE_POSITIONS, columns), draw(EXAMPLE_POSITIONS, columns)


@dataclass(frozen=True)
class Match:
    """One thing that a term can compare."""

    compares: str
    """Words for people, as the model card has them."""
    losses: Mapping[str, Loss]
    """Losses by name, the first is the default; empty: the kind of predictions has its own."""
    values: Callable[..., Tensor]
    """(loss, micro-batch, valid positions, pair) -> [N]; with `on_logits` (loss, student's logits [n, V], teacher's
    logits or None, labels [n], real classes) -> [n]."""
    mask: Mask
    """Positions that count."""
    example: Callable[[Callable[..., Tensor], int], tuple[Any, ...]] = _example_vectors
    """(function that draws normal numbers of a shape, columns) -> arguments for a loss at `EXAMPLE_POSITIONS`, the
    student's first; the last has one row per position."""
    on_logits: bool = False
    """All such terms share one pass over the logits, a few positions at a time."""
    needs_teacher: bool = True
    capture: str | None = None
    """The field of `Capture` that the layers of its pairs go to."""
    pairs: tuple[Pair, ...] = ()
    """The pairs where the term has no `map` to say them."""
    projected: bool = False
    """True where a linear map brings the student's states to the teacher's width."""
    problem: Callable[[str, str], str | None] = lambda _kind, _loss: None
    """(kind of predictions, name of the loss) -> why they do not go together."""
    fits_teacher: Callable[[Any, Mapping[str, Any], str], None] | None = None
    """(teacher, on the meta device; parameters of a built-in loss; their key) -> InputError where they do not fit."""

    @property
    def of_encoder(self) -> Match:
        """The same of the encoder's hidden states, at the positions that it reads."""
        field = f"encoder_{self.capture}"
        return replace(self, values=partial(_compare_states, field), mask="source", capture=field)

    @property
    def default(self) -> str | None:
        """Name of the loss where the term gives none."""
        return next(iter(self.losses), None)


def projection_name(field: str | None, pair: Pair) -> str:
    """Name the projection between two layers of the stack whose states `field` of `Capture` asks for."""
    return f"{'encoder:' if field == 'encoder_hidden' else ''}{pair[0]}:{pair[1]}"


def _compare_labels(loss: Loss, student: Tensor, _teacher: Any, labels: Tensor, _classes: slice) -> Tensor:
    return loss(student, labels)


def _compare_logits(loss: Loss, student: Tensor, teacher: Any, _labels: Tensor, classes: slice) -> Tensor:
    student = student[..., classes]
    if not isinstance(teacher, TopK):
        return loss(student, teacher[..., classes])
    if getattr(loss, "func", None) in LOGITS.values():
        return loss(student, teacher)
    # For a loss of the user's own the tail is a class like the tokens.
    return loss(with_tail(student, teacher.ids), teacher.log_probabilities)


def _compare_states(field: str, loss: Loss, micro: MicroBatch, valid: Positions, pair: Pair) -> Tensor:
    states = getattr(micro.student, field)[pair[0]], getattr(micro.teacher, field)[pair[1]]
    student, teacher = map(valid.select, states)
    name = projection_name(field, pair)
    if name in micro.projections:
        projection = micro.projections[name]
        student = projection(student.to(next(projection.parameters()).dtype))
    return loss(student, teacher.detach())


def _compare_attention(field: str, loss: Loss, micro: MicroBatch, valid: Positions, pair: Pair) -> Tensor:
    """Compare at every position, padding included, and select afterwards: a query is compared by all its keys."""
    student, teacher = getattr(micro.student, field)[pair[0]], getattr(micro.teacher, field)[pair[1]]
    values: Tensor = valid.select(loss(student, teacher, micro.visible))
    return values


def _compare_outputs(loss: Loss, micro: MicroBatch, valid: Positions, _pair: Pair) -> Tensor:
    return loss(valid.select(micro.student.logits), valid.select(micro.teacher.logits).detach())


def _example_attention(draw: Callable[..., Tensor], _columns: int) -> tuple[Any, ...]:
    student, teacher = (draw(1, 2, EXAMPLE_POSITIONS, EXAMPLE_POSITIONS).softmax(-1) for _ in range(2))
    return student, teacher, torch.ones_like(student[:, 0], dtype=torch.bool)


def _example_relations(draw: Callable[..., Tensor], columns: int) -> tuple[Any, ...]:
    student, teacher = ([draw(1, EXAMPLE_POSITIONS, columns) for _ in range(3)] for _ in range(2))
    visible = torch.ones(1, EXAMPLE_POSITIONS, EXAMPLE_POSITIONS, dtype=torch.bool, device=student[0].device)
    return student, teacher, visible


def _without_distribution(kind: str, loss: str) -> str | None:
    if loss == "tail_aware_kl" and not PREDICTION_KINDS[kind].vocabulary:
        return "tail_aware_kl is for vocabularies, whose tail is long; write `loss: forward_kl`"
    if kind != "regression" or loss == "logit_mse" or ":" in loss:
        return None
    return "a regression head has one number, not a distribution; write `loss: logit_mse`"


def _without_embedding(kind: str, _loss: str) -> str | None:
    if kind == "embedding":
        return None
    return "`match: output` compares sentence embeddings; for this head match logits"


def _check_relation_heads(teacher: Any, params: Mapping[str, Any], where: str) -> None:
    """Refuse relation heads that do not divide the teacher's queries, keys or values; the student's are as wide."""
    heads = params.get("heads", 1)
    layers = range(len(layers_of(teacher)))
    for width in sorted({width for layer in layers for width in relation_widths(teacher, layer)}):
        if width % heads:
            raise InputError(f"{where}.heads: {heads} does not divide {width}, a width of the teacher's attention")


MATCHES: dict[str, Match] = {
    "labels": Match(
        "predictions with labels", {}, _compare_labels, "labelled",
        on_logits=True, needs_teacher=False,
    ),
    "logits": Match(
        "predictions with the teacher's", LOGITS, _compare_logits,
        "predicted", on_logits=True, problem=_without_distribution,
    ),
    "hidden": Match(
        "outputs of mapped layers", HIDDEN, partial(_compare_states, "hidden"), "states",
        capture="hidden", projected=True,
    ),
    "embeddings": Match(
        "what goes into the first layer", HIDDEN, partial(_compare_states, "hidden"), "states",
        capture="hidden", pairs=((-1, -1),), projected=True,
    ),
    "attention": Match(
        "attention probabilities of mapped layers", ATTENTION,
        partial(_compare_attention, "attention"), "states", _example_attention, capture="attention",
    ),
    "relations": Match(
        "queries, keys and values of mapped layers, each with itself", RELATION,
        partial(_compare_attention, "relations"), "states", _example_relations,
        capture="relations", fits_teacher=_check_relation_heads,
    ),
    "output": Match(
        # The pair stands for the one comparison; there is no layer to name.
        "sentence embeddings", HIDDEN, _compare_outputs, "predicted",
        pairs=((0, 0),), problem=_without_embedding,
    ),
}  # fmt: skip

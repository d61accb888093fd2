"""The training loss: the only place that shifts, masks, selects, scales, weights and counts.

B examples, L positions, N selected positions, V classes or vocabulary, D hidden width, K terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import InputError
from distill.losses.align import TopK, without_autocast
from distill.losses.chunked import HeadInput, through_heads
from distill.losses.kinds import PREDICTION_KINDS, PredictionKind
from distill.losses.terms import Maps, ResolvedTerm, resolve
from distill.losses.trial import check_values
from distill.models.forward import Batch, Capture, Outputs
from distill.recipe.schema import Term

PREDICTIONS = ("labels", "logits")
"""Matches that read the predictions of the head; all of them share one pass over the logits."""


class Objective:
    """The weighted sum of all terms, each a mean over its own number of valid positions.

    The positions of a term are counted over the whole optimizer step, every micro-batch of every process, and each
    call divides by that number. The losses of the micro-batches then simply add up to the exact mean, however the
    examples were dealt out. A mean per micro-batch would give a token in a short one more weight.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        head: str,
        maps: Maps | None = None,
        vocabulary: int | None = None,
        chunk: int | None = None,
    ):
        """Resolve every name and parameter, so that a wrong one is found before any work is done.

        Args:
            terms: the recipe's `losses`, at least one.
            head: the kind of head, a name from `distill.losses.kinds.PREDICTION_KINDS`.
            maps: turns a term's `map` into layer pairs, e.g. `partial(layer_map, plan=plan, student_layers=3,
                teacher_layers=6)`; only terms on layers need it.
            vocabulary: number of real classes; what a padded output head has beyond is ignored by logits terms.
            chunk: positions whose logits are there at once; None: as many as suit the device.

        Raises:
            InputError: no terms, an unknown loss, a wrong parameter, a key that the term does not use, or a loss that
                fails on two positions or that a student cannot learn from.
        """
        if not terms:
            raise InputError("losses: there is nothing to learn from; give at least one term")
        self.head = PREDICTION_KINDS[head]
        self.vocabulary = vocabulary
        self.chunk = chunk
        self._terms = resolve(terms, head, maps)
        self.projections = nn.ModuleDict()
        """Learned maps from the student's width to the teacher's, one per pair of layers; see `project`."""
        matches = {term.match for term in self._terms}
        self.needs_teacher = bool(matches - {"labels"})
        self.student, self.teacher = (
            Capture(
                hidden=self._layers(side, "hidden", "embeddings"),
                attention=self._layers(side, "attention"),
                relations=self._layers(side, "relations"),
                stop_at_head=self.head.vocabulary,
            )
            for side in (0, 1)
        )

    def _layers(self, side: int, *matches: str) -> list[int]:
        return sorted({pair[side] for term in self._terms if term.match in matches for pair in term.pairs})

    @property
    def names(self) -> list[str]:
        """One name per term, as reports show it: `labels`, `logits.forward_kl`, `hidden.mse`, `hidden.mse.2`."""
        return [term.name for term in self._terms]

    def project(self, student_width: int, teacher_width: int) -> None:
        """Where the widths differ, give each compared pair of hidden states a linear map from the student's width.

        It starts as the identity on the widths that both have. `DistillModel` makes it part of what is trained and
        checkpointed; it is not part of the student, so a release does not have it.
        """
        if student_width == teacher_width:
            return
        for term in self._terms:
            for pair in term.pairs if term.match in ("hidden", "embeddings") else ():
                linear = nn.Linear(student_width, teacher_width)
                nn.init.eye_(linear.weight)
                nn.init.zeros_(linear.bias)
                self.projections[_name(pair)] = linear

    def counts(self, batches: Iterable[Batch]) -> Tensor:
        """Valid positions per term over all `batches`, int64 [K]; needs no forward pass.

        Labels: positions with a label. Logits: positions where the teacher predicts. Layers: real tokens, counted
        once however many layers are paired, because the term is the mean over its pairs.
        """
        total = torch.zeros(len(self._terms), dtype=torch.int64)
        for batch in batches:
            counts = torch.stack([self.head.mask(term.match)(batch).sum() for term in self._terms])
            total = total.to(counts.device) + counts
        return total

    def __call__(
        self, student: Outputs, teacher: Outputs | None, batch: Batch, counts: Tensor, progress: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The share of one micro-batch in the loss of the optimizer step.

        Only valid positions are computed: they are selected first, so padding has no effect and no gradient. Finding
        them, once for each kind of position, is also the only point where the host waits for the device. Nothing is
        read back (`.item()`), because each such read would stall the queue of kernels once per micro-batch; the sums
        stay on the device until somebody logs them.

        Args:
            student: what `self.student` asks for.
            teacher: what `self.teacher` asks for; None when no term needs a teacher.
            batch: `labels` (-100: none), `attention_mask` [B, L] (0: padding) and, for packed examples,
                `document_ids` [B, L].
            counts: `counts(...)` of the whole optimizer step, summed over processes.
            progress: share of the training that is done, 0 to 1; schedules follow it.

        Returns:
            The loss, a scalar that is part of the graph even when no position is valid (DDP waits for the gradient of
            every parameter); and the detached sum of each term, fp32 [K], with temperature², without weight.

        Raises:
            ValueError: a term needs a teacher and there is none.
            InputError: a loss cannot compare these two models, or did not return one value per position.
        """
        if self.needs_teacher and teacher is None:
            raise ValueError(f"the terms {self.names} need a teacher's outputs, and got none")
        now = [_Now(term, *term.at(progress), count) for term, count in zip(self._terms, counts, strict=True)]
        on_head = [term for term in now if term.match in PREDICTIONS]
        where = _Positions(self.head, batch)
        loss, parts = self._from_predictions(student, teacher, batch, on_head, where)
        sums = dict(zip((term.name for term in on_head), parts, strict=True))
        with without_autocast(loss.device):
            for term in now:
                if term.match not in PREDICTIONS:
                    assert teacher is not None
                    total = self._from_layers(student, teacher, batch, term, where)
                    loss = loss + term.factor * total
                    sums[term.name] = total.detach()
        return loss, torch.stack([sums[name].float() for name in self.names])

    def _from_predictions(
        self, student: Outputs, teacher: Outputs | None, batch: Batch, terms: Sequence[_Now], where: _Positions
    ) -> tuple[Tensor, Tensor]:
        """The loss of the terms on predictions, and their sums, from one pass over the positions that predict.

        Without such a term no position is selected, which ties the head into the graph all the same.
        """
        matches = {term.match for term in terms}
        # Whatever has a label is predicted, so the positions of `logits` are those of both.
        valid = where("logits" if "logits" in matches else "labels") if terms else where.none
        labels = self.head.labels(batch)[valid]
        teacher = teacher if "logits" in matches else None
        factors = torch.stack([term.factor for term in terms]) if terms else labels.new_zeros(0, dtype=torch.float32)

        def score(own: Tensor, target: Any, labels: Tensor) -> Tensor:
            classes = slice(self.vocabulary)
            totals = [
                _total(term, own, labels)
                if term.match == "labels"
                else _total(term, own[..., classes], target if isinstance(target, TopK) else target[..., classes])
                for term in terms
            ]
            return torch.stack(totals) if totals else own[:0].sum(-1)

        with without_autocast(labels.device):
            own = self.head.selected(student, batch, valid)
            target = None if teacher is None else self.head.selected(teacher, batch, valid)
            if not isinstance(own, HeadInput):
                target = target.head(target.rows) if isinstance(target, HeadInput) else target
                sums = score(own, None if target is None else target.detach(), labels)
                loss = (factors * sums).sum() if terms else own[:0].sum()
                return loss, sums.detach()
        # Outside of the block, as on a GPU autocast says in which dtype the heads take their operands.
        return through_heads(own, target, labels, score, factors, self.chunk)

    def _from_layers(self, student: Outputs, teacher: Outputs, batch: Batch, term: _Now, where: _Positions) -> Tensor:
        """Sum over valid positions of a term on layers, the mean over its pairs."""
        valid = where(term.match)
        if term.match == "output":
            assert student.logits is not None and teacher.logits is not None
            return _total(term, student.logits[valid], teacher.logits[valid].detach())
        if term.match in ("attention", "relations"):
            of_every_pair: Any = (slice(None), *valid)
            return self._from_attention(student, teacher, batch, term)[of_every_pair].sum(-1).mean()
        totals = []
        for pair in term.pairs:
            own, target = student.hidden[pair[0]][valid], teacher.hidden[pair[1]][valid]
            if _name(pair) in self.projections:
                projection = self.projections[_name(pair)]
                own = projection(own.to(next(projection.parameters()).dtype))
            totals.append(_total(term, own, target.detach()))
        return torch.stack(totals).mean()

    def _from_attention(self, student: Outputs, teacher: Outputs, batch: Batch, term: _Now) -> Tensor:
        """Values of a term on attention at every position, padding included: [pairs, B, L]."""
        real = self.head.tokens(batch)
        seen = real[:, None, :] & real[:, :, None]
        if self.head.causal:
            seen = seen.tril()
        if "document_ids" in batch:
            seen = seen & (batch["document_ids"][:, None] == batch["document_ids"][:, :, None])
        own, target = getattr(student, term.match), getattr(teacher, term.match)
        return torch.stack([term.values(own[pair[0]], target[pair[1]], seen, shape=real.shape) for pair in term.pairs])


class _Positions:
    """The valid positions of each kind of term in one micro-batch, as indices.

    Indexing with a mask looks for its positions each time, again in the backward pass, and each time the host waits
    for the device. Here every mask is looked at once, however many tensors it selects from.
    """

    def __init__(self, head: PredictionKind, batch: Batch):
        self.head, self.batch = head, batch
        self._found: dict[Callable[[Batch], Tensor], tuple[Tensor, ...]] = {}

    def __call__(self, match: str) -> tuple[Tensor, ...]:
        """One int64 [N] for each axis of the mask."""
        mask = self.head.mask(match)
        if mask not in self._found:
            self._found[mask] = mask(self.batch).nonzero(as_tuple=True)
        return self._found[mask]

    @property
    def none(self) -> tuple[Tensor, ...]:
        """No position at all."""
        labels = self.head.own_labels(self.batch)
        return (labels.new_zeros(0, dtype=torch.int64),) * labels.ndim


class _Now:
    """A term at one point of the training, and its share of a count."""

    def __init__(self, term: ResolvedTerm, weight: float, scale: float, loss: Callable[..., Tensor], count: Tensor):
        self.key, self.name, self.match, self.pairs = term.key, term.name, term.match, term.pairs
        self.scale, self.loss = scale, loss
        self.factor = weight / count.clamp(min=1)

    def values(self, *compared: Any, shape: tuple[int, ...]) -> Tensor:
        """What the loss makes of the two sides, one value per position."""
        try:
            values = self.loss(*compared)
        except ValueError as error:  # of what only real models show: widths and heads that do not fit
            raise InputError(f"{self.key}: {self.name}: {error}") from error
        check_values(values, shape, f"{self.key}: {self.name}")
        return values


def _total(term: _Now, own: Tensor, target: Any) -> Tensor:
    return term.scale * term.values(own, target, shape=own.shape[:-1]).sum()


def _name(pair: tuple[int, int]) -> str:
    """Name of a pair's projection."""
    return f"{pair[0]}:{pair[1]}"

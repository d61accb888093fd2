"""The training loss: the only place that shifts, masks, selects, scales, weights and counts.

B examples, L positions, N selected positions, V classes or vocabulary, D hidden width, K terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.losses.align import Positions, without_autocast
from distill.losses.chunked import HeadInput, through_heads
from distill.losses.kinds import PREDICTION_KINDS, Mask
from distill.losses.matches import MicroBatch, located, projection_name
from distill.losses.precision import choose_precision, estimate_kl
from distill.losses.slopes import Fastest, Terms
from distill.losses.terms import Maps, ResolvedTerm, resolve
from distill.models.forward import Batch, Capture, Outputs
from distill.models.head import HeadPrecision
from distill.recipe.schema import Term


class Objective:
    """The weighted sum of all terms, each a mean over its own number of valid positions.

    The positions of a term are counted over the whole optimizer step, every micro-batch of every rank, and each
    call divides by that number. The losses of the micro-batches then simply add up to the exact mean, however the
    examples were dealt out. A mean per micro-batch would give a token in a short one more weight.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        kind: str,
        maps: Maps | None = None,
        vocabulary: int | None = None,
        chunk: int | None = None,
        encoder_maps: Maps | None = None,
        head_precision: HeadPrecision | None = None,
    ):
        """Resolve every name and parameter, so that a wrong one is found before any work is done.

        Args:
            terms: the recipe's `losses`, at least one.
            kind: what is predicted, a name from `distill.losses.PREDICTION_KINDS`.
            maps: turns a term's `map` into layer pairs, e.g. `partial(layer_map, plan=plan, student_layers=3,
                teacher_layers=6)`; only terms on layers need it.
            vocabulary: number of real classes; what a padded output head has beyond is ignored by logits terms.
            chunk: positions whose logits are there at once; None: as many as suit the device.
            encoder_maps: `maps` for the encoder of an encoder-decoder; None: the models have one stack.
            head_precision: of the operands of the output heads' products; None: that of the weights or of autocast.

        Raises:
            InputError: an unknown loss, a wrong parameter, a key that the term does not use, or a loss of the
                user's own that fails on two positions or that a student cannot learn from.
        """
        self.kind = PREDICTION_KINDS[kind]
        self.classes = slice(vocabulary)
        self.chunk = chunk
        self.head_precision = head_precision
        """Of the operands of the heads' products; None: that of the weights or of autocast."""
        self._slopes = Fastest()
        self._terms = resolve(terms, kind, maps, encoder_maps)
        self.projections = nn.ModuleDict()
        """Learned maps from the student's width to the teacher's, one per pair of layers; see `project`."""
        self.needs_teacher = any(term.match.needs_teacher for term in self._terms)
        self.student, self.teacher = self._capture(0), self._capture(1)

    def _capture(self, side: int) -> Capture:
        """Collect what the pairs of all terms need of the student (side 0) or of the teacher (1)."""
        layers: dict[str, Any] = {}
        for term in self._terms:
            if term.match.capture:
                layers.setdefault(term.match.capture, set()).update(pair[side] for pair in term.pairs)
        fields = {field: sorted(indices) for field, indices in layers.items()}
        return Capture(**fields, stop_at_head=self.kind.vocabulary)

    @property
    def names(self) -> list[str]:
        """Name each term, as reports show it: `labels`, `logits.forward_kl`, `hidden.mse`, `hidden.mse.2`."""
        return [term.name for term in self._terms]

    def project(self, student_width: int, teacher_width: int) -> None:
        """Give each compared pair of hidden states a linear map to the teacher's width, if the widths differ.

        It starts as the identity on the widths that both have. `DistillModel` makes it part of what is trained and
        checkpointed; it is not part of the student, so a release does not have it.
        """
        if student_width == teacher_width:
            return
        for term in self._terms:
            for pair in term.pairs if term.match.projected else ():
                linear = nn.Linear(student_width, teacher_width)
                nn.init.eye_(linear.weight)
                nn.init.zeros_(linear.bias)
                self.projections[projection_name(term.match.capture, pair)] = linear

    def notices(self) -> list[str]:
        """Return, and clear, the notices about how the loss is computed; each comes once."""
        notices, self._slopes.notices = self._slopes.notices, []
        return notices

    def adapt_head_precision(self, values: Mapping[str, float | None]) -> str | None:
        """Choose the operands of the heads by how near student and teacher are by now.

        Args:
            values: mean of each term, by name.

        Returns:
            A line about it where the choice changes.
        """
        nearest: float | None = math.inf
        for term in [term for term in self._terms if term.match.on_logits and term.match.needs_teacher]:
            value = values[term.name]
            if value is None:
                continue
            near = estimate_kl(term.named.name, value * term.to_temperature_one, term.named.params)
            nearest = None if near is None or nearest is None else min(nearest, near)
        chosen, before = choose_precision(nearest), self.head_precision
        self.head_precision = chosen
        if chosen == before:
            return None
        distance = "the distance to the teacher is not known" if nearest is None else f"KL to the teacher {nearest:.2g}"
        return f"operands of the output head: {chosen} ({distance})"

    def locate(self, batch: Batch) -> Batch:
        """Add the positions of the terms to a batch on the host; on a device the host would have to wait for them."""
        micro, masks = MicroBatch(self.kind, batch, Outputs(None), None, self.projections), set[Mask]()
        for term in self._terms:
            masks.add(term.match.mask)
        if any(term.match.on_logits and term.match.needs_teacher for term in self._terms):
            masks.add("predicted")
        return {**batch, **{located(mask): micro.positions(mask).index for mask in sorted(masks)}}

    def counts(self, batches: Iterable[Batch]) -> Tensor:
        """Count the valid positions of each term over all `batches`, int64 [K]; needs no forward pass.

        Labels: positions with a label. Logits: positions where the teacher predicts. Layers: real tokens, counted
        once however many layers are paired, because the term is the mean over its pairs.
        """
        total = torch.zeros(len(self._terms), dtype=torch.int64)
        for batch in batches:
            counts = torch.stack([getattr(self.kind, term.match.mask)(batch).sum() for term in self._terms])
            total = total.to(counts.device) + counts
        return total

    def __call__(
        self, student: Outputs, teacher: Outputs | None, batch: Batch, counts: Tensor, progress: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Compute the share of one micro-batch in the loss of the optimizer step.

        Only valid positions are computed: they are selected first, so padding has no effect and no gradient. Finding
        them, once for each kind of position, is also the only point where the host waits for the device. Nothing is
        read back (`.item()`), because each such read would stall the queue of kernels once per micro-batch; the sums
        stay on the device until somebody logs them.

        Args:
            student: what `self.student` asks for.
            teacher: what `self.teacher` asks for; None when no term needs a teacher.
            batch: `labels` (-100: none), `attention_mask` [B, L] (0: padding) and, for packed examples,
                `document_ids` [B, L].
            counts: `counts(...)` of the whole optimizer step, summed over ranks.
            progress: share of the training that is done, 0 to 1; schedules follow it.

        Returns:
            The loss, a scalar that is part of the graph even when no position is valid (DDP waits for the gradient of
            every parameter); and the detached sum of each term, fp32 [K], with temperature², without weight.

        Raises:
            ValueError: a term needs a teacher and there is none.
            InputError: a loss cannot compare these two models.
        """
        if self.needs_teacher and teacher is None:
            raise ValueError(f"the terms {self.names} need a teacher's outputs, and got none")
        terms = self._at(progress)
        factors = [term.weight / count for term, count in zip(terms, counts.clamp(min=1), strict=True)]
        micro = MicroBatch(self.kind, batch, student, teacher, self.projections)
        on_logits = [number for number, term in enumerate(terms) if term.match.on_logits]
        loss, sums = self._from_logits(micro, [terms[n] for n in on_logits], [factors[n] for n in on_logits])
        totals = dict(zip(on_logits, sums, strict=True))
        with without_autocast(loss.device):
            for number, (term, factor) in enumerate(zip(terms, factors, strict=True)):
                if number not in totals:
                    valid = micro.positions(term.match.mask)
                    total = torch.stack([term.total(micro, valid, pair) for pair in term.pairs]).mean()
                    loss = loss + factor * total
                    totals[number] = total.detach()
        return loss, torch.stack([totals[number].float() for number in range(len(terms))])

    def _at(self, progress: float) -> list[ResolvedTerm]:
        """Follow the schedules, once per step: all micro-batches of a step have the same progress."""
        if self._terms[0].progress != progress:
            self._terms = [replace(term, progress=progress) for term in self._terms]
        return self._terms

    def _from_logits(
        self, micro: MicroBatch, terms: Sequence[ResolvedTerm], factors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss of the terms on logits, and their sums, in one pass over the positions that predict.

        Without such a term no position is selected, which ties the head into the graph all the same.
        """
        with_teacher = any(term.match.needs_teacher for term in terms)
        labels = self.kind.labels(micro.batch)
        valid = Positions(labels.new_zeros(0, dtype=torch.int64), labels.ndim)
        if terms:  # whatever has a label is predicted, so the positions with predictions are those of both
            valid = micro.positions("predicted" if with_teacher else "labelled")
        labels = valid.select(labels)

        def sum_terms(student: Tensor, teacher: Any, labels: Tensor) -> Tensor:
            sums = [term.total(student, teacher, labels, self.classes) for term in terms]
            return torch.stack(sums) if sums else student[:0].sum(-1)

        with without_autocast(labels.device):
            factor = torch.stack(list(factors)) if terms else labels.new_zeros(0, dtype=torch.float32)
            student = self.kind.select(micro.student, micro.batch, valid)
            teacher = self.kind.select(micro.teacher, micro.batch, valid) if with_teacher else None
            student, teacher = (self._in_head_precision(side) for side in (student, teacher))
            if not isinstance(student, HeadInput):
                if isinstance(teacher, HeadInput):
                    teacher = teacher.head(teacher.rows)
                sums = sum_terms(student, None if teacher is None else teacher.detach(), labels)
                return (factor * sums).sum(), sums.detach()
        # Outside of the block, as on a GPU autocast says in which dtype the heads take their operands.
        key = [(id(term.function), term.scale, str(term.named.params)) for term in terms]
        fixed = not any(term.changes for term in terms)
        named = [term.named for term in terms]
        made = Terms(sum_terms, named, self.classes.stop, (tuple(key), self.classes.stop) if fixed else None)
        return through_heads(student, teacher, labels, made, factor, self.chunk, self._slopes)

    def _in_head_precision(self, side: Any) -> Any:
        if not isinstance(side, HeadInput) or self.head_precision is None:
            return side
        return replace(side, head=replace(side.head, precision=self.head_precision))


def label_loss(kind: str) -> Callable[[Outputs, Batch], tuple[Tensor, int]]:
    """Make (outputs, batch) -> (summed cross-entropy on labels, their number), for scores and removals of layers."""
    objective = Objective((Term(match="labels"),), kind)

    def loss(outputs: Outputs, batch: Batch) -> tuple[Tensor, int]:
        counts = objective.counts([batch])
        return objective(outputs, None, batch, torch.ones_like(counts))[0], int(counts.sum())

    return loss

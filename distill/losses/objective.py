"""The training loss: the only place that shifts, masks, selects, scales, weights and counts.

B examples, L positions, N selected positions, V classes or vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from distill.errors import InputError
from distill.losses.hidden import HIDDEN
from distill.losses.logits import LOGITS
from distill.losses.mapping import LayerMap, Policy
from distill.models.outputs import Batch, Outputs
from distill.recipe.schema import Term
from distill.registry import bind, find

Head = Literal["sequence", "next_token"]
UNLABELLED = -100
TABLES = {"logits": LOGITS, "hidden": HIDDEN}
DEFAULTS = {"logits": "forward_kl", "hidden": "mse"}
USED_KEYS = {
    "labels": set[str](),
    "logits": {"loss", "temperature", "scale_by_temperature", "params"},
    "hidden": {"loss", "map", "params"},
}
"""Keys of a term, beyond `match` and `weight`, that mean something for what it matches."""

Key = Literal["labels", "logits"] | tuple[int, int]
"""What is compared: logits with labels, logits with logits, or a (student layer, teacher layer) pair."""


@dataclass(frozen=True)
class _Resolved:
    """A term whose loss is a function of two tensors and nothing else."""

    name: str
    match: Literal["labels", "logits", "hidden"]
    weight: float
    scale: float
    """temperature² or 1."""
    loss: Callable[[Tensor, Tensor], Tensor]
    keys: tuple[Key, ...]
    """What the loss is applied to; the term is the mean over them."""


class Objective:
    """The weighted sum of all terms, each a mean over its own number of valid positions.

    The positions of a term are counted over the whole optimizer step, every micro-batch of every process, and each
    call divides by that number. The losses of the micro-batches then simply add up to the exact mean, however the
    examples were dealt out. A mean per micro-batch would give a token in a short one more weight.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        head: Head,
        maps: Callable[[Policy], LayerMap] | None = None,
        vocabulary: int | None = None,
    ):
        """Resolve every name and parameter, so that a wrong one is found before any work is done.

        Args:
            terms: the recipe's `losses`, at least one.
            head: `sequence`, one prediction per example (logits [B, V], labels [B]), or `next_token`, where position
                i predicts the label of i + 1 (logits [B, L, V], labels [B, L], not shifted).
            maps: turns a hidden term's `map` into layer pairs, e.g. `partial(layer_map, plan=plan, student_layers=3,
                teacher_layers=6)`; only hidden terms need it.
            vocabulary: number of real classes; what a padded output head has beyond is ignored by logits terms.

        Raises:
            InputError: no terms, an unknown loss, a wrong parameter, or a key that the term does not use.
        """
        if not terms:
            raise InputError("losses: there is nothing to learn from; give at least one term")
        self.head = head
        self.vocabulary = vocabulary
        self._terms: list[_Resolved] = []
        for index, term in enumerate(terms):
            self._terms.append(_resolve(term, f"losses.{index}", self.names, maps))
        matches = {term.match for term in self._terms}
        pairs = {key for term in self._terms for key in term.keys if isinstance(key, tuple)}
        self.needs_teacher = bool(matches & {"logits", "hidden"})
        self.needs_logits = bool(matches & {"labels", "logits"})
        self.student_layers = sorted({student for student, _ in pairs})
        self.teacher_layers = sorted({teacher for _, teacher in pairs})

    @property
    def names(self) -> list[str]:
        """One name per term, as reports show it: `labels`, `logits.forward_kl`, `hidden.mse`, `hidden.mse.2`."""
        return [term.name for term in self._terms]

    def counts(self, batches: Iterable[Batch]) -> Tensor:
        """Valid positions per term over all `batches`, int64 [terms]; needs no forward pass.

        Labels: positions with a label. Logits: positions where the teacher predicts. Hidden: real tokens, counted
        once however many layers are paired, because the term is the mean over its pairs.
        """
        total = torch.zeros(len(self._terms), dtype=torch.int64)
        for batch in batches:
            counts = torch.stack([self._mask(term.match, batch).sum() for term in self._terms])
            total = total.to(counts.device) + counts
        return total

    def __call__(
        self, student: Outputs, teacher: Outputs | None, batch: Batch, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The share of one micro-batch in the loss of the optimizer step.

        Only valid positions are computed: they are selected first, so padding has no effect and no gradient, and no
        fp32 copy of all the logits is ever made. Selecting them is also the only point where the host waits for the
        device. Nothing is read back (`.item()`), because each such read would stall the queue of kernels once per
        micro-batch; the sums stay on the device until somebody logs them.

        Args:
            student: logits, and the hidden states of `student_layers`.
            teacher: logits, and the hidden states of `teacher_layers`; None when no term needs a teacher.
            batch: `labels` (-100: none), `attention_mask` [B, L] (0: padding) and, for packed examples,
                `document_ids` [B, L].
            counts: `counts(...)` of the whole optimizer step, summed over processes.

        Returns:
            The loss, a scalar that is part of the graph even when no position is valid (DDP waits for the gradient of
            every parameter); and the detached sum of each term, fp32 [terms], with temperature², without weight.

        Raises:
            ValueError: a term needs a teacher and there is none, or a loss did not return one value per position.
        """
        rows = self._selected(student, teacher, batch)
        # Hidden states alone leave the output head out of the graph. An empty slice ties it in: its sum is exactly 0
        # whatever the logits are, where 0 * logits.sum() is NaN as soon as one of them is infinite.
        loss = student.logits.new_zeros(()) if self.needs_logits else student.logits[..., :0].sum()
        sums = []
        for term, count in zip(self._terms, counts, strict=True):
            total = term.scale * torch.stack([_total(term, *rows[key]) for key in term.keys]).mean()
            loss = loss + term.weight * total / count.clamp(min=1)
            sums.append(total.detach().float())
        return loss, torch.stack(sums)

    def _mask(self, match: str, batch: Batch) -> Tensor:
        """Valid positions, boolean: [B, L] for hidden states, [B] or [B, L - 1] (of the predicted token) otherwise."""
        attended = batch["attention_mask"].bool()
        if match == "hidden":
            return attended
        if self.head == "sequence":
            return batch["labels"] != UNLABELLED if match == "labels" else attended.any(-1)
        # The mask moves with the labels: a prediction counts when both the token it is made at and the one it is
        # about are real and of one document.
        valid = attended[:, 1:] & attended[:, :-1]
        if "document_ids" in batch:
            valid = valid & (batch["document_ids"][:, 1:] == batch["document_ids"][:, :-1])
        return valid & (batch["labels"][:, 1:] != UNLABELLED) if match == "labels" else valid

    def _selected(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[Key, tuple[Tensor, Tensor]]:
        """Valid positions of both sides of each comparison, selected once however many terms read them.

        The student's side is [N, V] or [N, D]; the other is the same for a teacher, without gradient, or [N] labels.
        """
        masks = {term.match: self._mask(term.match, batch) for term in self._terms}
        rows = {}
        for term in self._terms:
            for key in term.keys:
                if key not in rows:
                    own, target = self._sides(key, student, teacher, batch)
                    rows[key] = own[masks[term.match]], target.detach()[masks[term.match]]
        return rows

    def _sides(self, key: Key, student: Outputs, teacher: Outputs | None, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both sides of one comparison at every position; next-token logits lose the last, which predicts nothing."""
        if key == "labels":
            labels = batch["labels"][:, 1:] if self.head == "next_token" else batch["labels"]
            return self._predictions(student), labels
        if teacher is None:
            raise ValueError(f"the terms {self.names} need a teacher's outputs, and got none")
        if key == "logits":
            classes = slice(self.vocabulary)
            return self._predictions(student)[..., classes], self._predictions(teacher)[..., classes]
        return student.hidden[key[0]], teacher.hidden[key[1]]

    def _predictions(self, outputs: Outputs) -> Tensor:
        """The logits that have something to predict: in a text, all but those of the last position."""
        return outputs.logits[:, :-1] if self.head == "next_token" else outputs.logits


def _total(term: _Resolved, own: Tensor, target: Tensor) -> Tensor:
    values = term.loss(own, target)
    if values.shape != own.shape[:-1]:
        # A loss that takes its own mean would silently weigh every micro-batch the same.
        raise ValueError(
            f"{term.name} must return one value per position, {tuple(own.shape[:-1])}, got {tuple(values.shape)}"
        )
    return values.sum()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(wide, labels, reduction="none")


def _resolve(term: Term, where: str, taken: list[str], maps: Callable[[Policy], LayerMap] | None) -> _Resolved:
    _refuse_unused_keys(term, where)
    if term.match == "labels":
        return _Resolved(_unique("labels", taken), "labels", term.weight, 1.0, _cross_entropy, ("labels",))
    name = term.loss or DEFAULTS[term.match]
    title = _unique(f"{term.match}.{name.rpartition(':')[2]}", taken)
    loss = _bound(term, name, where)
    if term.match == "logits":
        scale = term.temperature**2 if term.scale_by_temperature else 1.0
        return _Resolved(title, "logits", term.weight, scale, loss, ("logits",))
    if maps is None:
        raise ValueError(f"{where}: a hidden term needs `maps`, see Objective")
    return _Resolved(title, "hidden", term.weight, 1.0, loss, maps(term.map).pairs)


def _refuse_unused_keys(term: Term, where: str) -> None:
    """A key without effect is a misunderstanding: say so instead of training something else than was asked."""
    fields = type(term).model_fields.items()
    changed = {key for key, field in fields if key not in {"match", "weight"} and getattr(term, key) != field.default}
    unused = sorted(changed - USED_KEYS[term.match])
    if unused:
        raise InputError(f"{where}: a term that matches {term.match} does not use {', '.join(unused)}; remove it")


def _bound(term: Term, name: str, where: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The named loss as a function of two tensors, its parameters checked."""
    params = dict(term.params)
    if term.match == "logits":
        if "temperature" in params:
            raise InputError(f"{where}.params.temperature: this is a key of the term itself, {where}.temperature")
        params["temperature"] = term.temperature
    table = TABLES[term.match]
    loss: Callable[[Tensor, Tensor], Tensor] = bind(find(table, name, what="loss"), params, where=f"{where}.params")
    if name in table:
        try:  # ranges are checked by the loss itself: ask it now rather than at the first training step
            loss(torch.zeros(1, 2), torch.zeros(1, 2))
        except ValueError as error:
            raise InputError(f"{where}.params: {error}") from error
    return loss


def _unique(name: str, taken: list[str]) -> str:
    """`name`, or `name.2`, `name.3`, … when terms before it have that name."""
    same = sum(other == name or other.rpartition(".")[0] == name for other in taken)
    return f"{name}.{same + 1}" if same else name

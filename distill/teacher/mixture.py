"""Several teachers as one: a batch in, and out what their mixture predicts and what the first one computes inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distill.models.forward import Batch, Outputs, device_of
from distill.models.mixture import MIXED, mix_classes, mix_heads
from distill.teacher.live import LiveTeacher

Member = Callable[[Batch], Outputs]


class Mixture:
    """A weighted mixture of teachers, which may depend on the source of an example.

    They run one after the other, each on the whole batch. Layers and attention are the first one's.
    """

    def __init__(
        self, members: Sequence[Member], shares: Sequence[Sequence[float]], kind: str, vocabulary: int | None = None
    ):
        """Take any callables: live teachers, or ones read from disk.

        Args:
            members: One vocabulary, or the same classes.
            shares: Of each member, by route; a batch without `route` [B] takes the first row.
            kind: Of predictions, a name from `distill.losses.PREDICTION_KINDS`.
            vocabulary: Real tokens, for heads over a vocabulary.
        """
        self.members, self.kind, self.vocabulary = members, kind, vocabulary
        self.weights = torch.tensor(shares, dtype=torch.float32).log()
        """[routes, T]"""

    @property
    def models(self) -> list[Any]:
        """The models of live members."""
        return [member.model for member in self.members if isinstance(member, LiveTeacher)]

    @property
    def model(self) -> Any:
        """The first one's."""
        return self.models[0]

    @property
    def device(self) -> torch.device:
        """That of the first one; the others bring their outputs there."""
        first = self.members[0]
        return first.device if isinstance(first, LiveTeacher) else torch.device("cpu")

    @property
    def width(self) -> int:
        """Of the first one's hidden states."""
        return int(self.model.config.hidden_size)

    @property
    def precision(self) -> str:
        """That of the first one."""
        first = self.members[0]
        return first.precision if isinstance(first, LiveTeacher) else "fp32"

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        """Run every member, and mix what they predict."""
        given = [member(batch) for member in self.members]
        first = given[0]
        shape = first.logits if first.last is None else first.last
        assert shape is not None, "a forward pass gives logits or what they are made from"
        if self.weights.device != device_of(batch):
            self.weights = self.weights.to(device_of(batch))
        weights = self.weights[batch["route"]] if "route" in batch else self.weights[:1].expand(len(shape), -1)
        rows, heads = [each.last for each in given], [each.head for each in given]
        if all(each is not None for each in (*rows, *heads)):
            last, head = mix_heads(rows, heads, weights, self.vocabulary)  # type: ignore[arg-type]
            return replace(first, last=last, head=head)
        logits = [self._logits(each, batch) for each in given]
        return replace(first, logits=MIXED.get(self.kind, mix_classes)(logits, weights), last=None, head=None)

    def _logits(self, given: Outputs, batch: Batch) -> Tensor:
        if given.logits is None:
            assert given.last is not None and given.head is not None
            logits: Tensor = given.head(given.last)
        else:
            logits = given.logits
        if self.kind == "span":  # an answer neither starts nor ends in padding
            return logits.masked_fill(~batch["attention_mask"].bool()[:, None], -torch.inf)
        return logits[..., : self.vocabulary]

"""The kinds of predictions that can be trained: the label of each prediction, and the positions that have any.

Every kind is brought to one form: predictions [*, V], labels [*], and two masks [*] of where there is a label and where
the teacher predicts. All that follows is the same for every kind.

B examples, L positions, V classes or vocabulary, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from distill.losses.align import Positions, widen, without_autocast
from distill.losses.chunked import HeadInput
from distill.models.forward import UNLABELLED, Batch, Outputs

CONTRASTIVE_TEMPERATURE = 0.05
Mask = Literal["labelled", "predicted", "states", "source"]
"""Positions: those that have a label, those where something is predicted, the tokens whose states are compared (of the
stack that has the head), and the real tokens that the encoder of an encoder-decoder reads."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute -log S(label) in fp32, [N]; 0 where the label is `UNLABELLED`."""
    return functional.cross_entropy(widen(logits), labels, reduction="none", ignore_index=UNLABELLED)


def contrastive(cosines: Tensor, partners: Tensor) -> Tensor:
    """Compute the cross-entropy of finding each text's partner among the others by cosine, [N]: InfoNCE, NT-Xent.

    Source: Chen et al. 2020 (SimCLR), arXiv:2002.05709, equation 1, with the temperature of sentence-transformers.
    """
    return cross_entropy(cosines / CONTRASTIVE_TEMPERATURE, partners)


def label_squared_error(values: Tensor, labels: Tensor) -> Tensor:
    """Compute (value - label)² in fp32, [N]; 0 where the label is `UNLABELLED`."""
    return torch.where(labels == UNLABELLED, 0.0, widen(values).squeeze(-1) - labels).square()


def _real_tokens(batch: Batch) -> Tensor:
    return batch["attention_mask"].bool()


def _source_positions(batch: Batch) -> Tensor:
    if "input_features" not in batch:
        return _real_tokens(batch)
    sound = batch["input_features"]  # [B, M, frames]; a speech encoder has a position for each two frames
    frames = batch.get("attention_mask", torch.ones_like(sound[:, 0]))
    return frames[:, ::2].bool()


@dataclass(frozen=True)
class PredictionKind:
    """The way in which outputs and labels of one kind meet."""

    predictions: Callable[[Tensor, Batch], Tensor]
    """(what the model puts out, the batch) -> [*, V]. Of a vocabulary head this is also done to what it reads."""
    raw_labels: Callable[[Batch], Tensor]
    """[*], `UNLABELLED` where there is none."""
    predicted: Callable[[Batch], Tensor]
    """Mask of the positions where something is predicted, boolean [*]."""
    vocabulary: bool = False
    """True where the classes are the tokens: too many to have their logits at once."""
    tokens: Callable[[Batch], Tensor] = _real_tokens
    """Real tokens of the stack of layers that has the head, boolean [B, L]."""
    source: Callable[[Batch], Tensor] = _source_positions
    """Real positions of the encoder of an encoder-decoder, boolean [B, L]."""
    causal: bool = False
    """True where a token sees only those before it."""
    label_loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    """(predictions [N, V], labels [N]) -> [N]."""
    classes: int | None = None
    """Columns of the predictions, where they are always as many."""
    vectors: bool = False
    """True where a model puts out a vector of each text; predictions are about the others of the micro-batch, whose
    size therefore counts."""

    def labels(self, batch: Batch) -> Tensor:
        """Give the labels [*]: the mask moves with them, so where nothing is predicted there is none."""
        return self.raw_labels(batch).masked_fill(~self.predicted(batch), UNLABELLED)

    def labelled(self, batch: Batch) -> Tensor:
        """Find where there is a label, boolean [*]."""
        return self.labels(batch) != UNLABELLED

    def states(self, batch: Batch) -> Tensor:
        """Find the tokens whose hidden states and attention are compared, boolean [B, L].

        They are the real tokens; where a batch says which tokens are `learned`, those that predict one.
        """
        tokens = self.tokens(batch)
        return tokens & functional.pad(batch["learned"][:, 1:], (0, 1)) if "learned" in batch else tokens

    def select(self, outputs: Outputs, batch: Batch, positions: Positions) -> Any:
        """Select the predictions at these positions: logits [N, V], or what they are made from."""
        if outputs.logits is not None:
            return positions.select(self.predictions(outputs.logits, batch))
        assert outputs.last is not None and outputs.head is not None
        return HeadInput(positions.select(self.predictions(outputs.last, batch)), outputs.head)


def _same(logits: Tensor, _batch: Batch) -> Tensor:
    return logits


def _labels(batch: Batch) -> Tensor:
    return batch["labels"]


def _labelled(batch: Batch) -> Tensor:
    return batch["labels"] != UNLABELLED


def _target_tokens(batch: Batch) -> Tensor:
    """Mask [B, T] of the target's tokens: those with a label, or those that are `written`, which have none."""
    return batch["written"] if "written" in batch else _labelled(batch)


def _next_labels(batch: Batch) -> Tensor:
    return batch["labels"][:, 1:]


def _real_examples(batch: Batch) -> Tensor:
    return batch["attention_mask"].bool().any(-1)


def _predicted_tokens(batch: Batch) -> Tensor:
    """Mask [B, L - 1]: the token a prediction is made at and the one it is about are real and of one document.

    Where a batch says which tokens are `learned` [B, L], only these are predicted.
    """
    real = _real_tokens(batch)
    valid = real[:, 1:] & real[:, :-1]
    if "document_ids" in batch:
        valid = valid & (batch["document_ids"][:, 1:] == batch["document_ids"][:, :-1])
    if "learned" in batch:
        valid = valid & batch["learned"][:, 1:]
    return valid


def _yes_or_no(logits: Tensor, _batch: Batch) -> Tensor:
    """[B, V] -> [B, V, 2]: sigmoid(z) is the softmax of (0, z)."""
    return torch.stack([torch.zeros_like(logits), logits], -1)


def _every_class(batch: Batch) -> Tensor:
    return _real_examples(batch)[:, None].expand(batch["labels"].shape)


def _real_positions(logits: Tensor, batch: Batch) -> Tensor:
    """[B, 2, L]: an answer neither starts nor ends in padding."""
    return logits.masked_fill(~_real_tokens(batch)[:, None], -torch.inf)


def _both_ends(batch: Batch) -> Tensor:
    return _real_examples(batch)[:, None].expand(-1, 2)


def _similarities(embeddings: Tensor, batch: Batch) -> Tensor:
    """[B, D] -> [B, B] cosines with the other examples of the micro-batch; padding and oneself are no option."""
    unit = functional.normalize(widen(embeddings), dim=-1)
    oneself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    with without_autocast(unit.device):
        cosines = unit @ unit.T
    return cosines.masked_fill(oneself | ~_real_examples(batch)[None, :], -torch.inf)


def _partners(batch: Batch) -> Tensor:
    """Find for each text the first other one with its label, [B]; `UNLABELLED` where there is none."""
    labels = batch["labels"]
    same = (labels[:, None] == labels) & (labels != UNLABELLED)
    same.fill_diagonal_(False)
    return torch.where(same.any(-1), same.int().argmax(-1), UNLABELLED)


PREDICTION_KINDS: dict[str, PredictionKind] = {
    # One class per example: logits [B, V], labels [B].
    "sequence": PredictionKind(_same, _labels, _real_examples),
    # Any number of classes per example: logits [B, V], labels [B, V] of 0 and 1; each class is a choice of its own.
    "multi_label": PredictionKind(_yes_or_no, lambda batch: batch["labels"].long(), _every_class, classes=2),
    # One number per example: [B, 1], labels [B].
    "regression": PredictionKind(_same, _labels, _real_examples, label_loss=label_squared_error, classes=1),
    # One class per token: logits [B, L, V], labels [B, L].
    "token": PredictionKind(_same, _labels, _real_tokens),
    # Start and end of an answer among the tokens: logits [B, 2, L], labels [B, 2].
    "span": PredictionKind(_real_positions, _labels, _both_ends),
    # One vector per text: [B, D], labels [B] that texts of one pair share; its logits are the cosines within the
    # micro-batch.
    "embedding": PredictionKind(_similarities, _partners, _real_examples, label_loss=contrastive, vectors=True),
    # The token after each one: logits [B, L, V], labels [B, L], not shifted.
    "next_token": PredictionKind(
        lambda logits, _: logits[:, :-1], _next_labels, _predicted_tokens, vocabulary=True, causal=True
    ),
    # The tokens that were masked: logits [B, L, V], labels [B, L], given where a token is masked.
    "masked_token": PredictionKind(_same, _labels, _labelled, vocabulary=True),
    # The target text, given its beginning: logits [B, L, V] of the decoder, labels [B, L].
    "seq2seq": PredictionKind(_same, _labels, _target_tokens, vocabulary=True, tokens=_target_tokens, causal=True),
}
"""The kinds by name."""

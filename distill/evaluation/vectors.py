"""Vectors of texts: what is kept of each, how similar two sets of them are, and what finds what among them.

n examples, T texts of an example, D width, k neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from distill.models.forward import Batch

BLOCK = 512
"""Rows of a matrix of similarities that are there at once."""
NEIGHBOURS = 10


def score_vectors(batch: Batch, vectors: Tensor, teacher: Tensor | None) -> dict[str, Tensor]:
    """Compute the columns of a batch's examples.

    Args:
        batch: With `texts`, and `scores` where the two texts of an example are rated.
        vectors: [n T, D], the texts of an example one after the other.
        teacher: The teacher's, where there is one.
    """
    shape = len(batch["texts"]), -1, vectors.shape[-1]
    own = vectors.float().reshape(shape)
    columns = {"embeddings": own[:, 0]}
    if "scores" in batch:
        columns |= {"values": _cosine(own[:, 0], own[:, 1]), "targets": batch["scores"]}
    elif own.shape[1] > 1:
        columns["pair_embeddings"] = own[:, 1]
    if teacher is not None:
        theirs = teacher.float().reshape(shape)
        columns["teacher_embeddings"] = theirs[:, 0]
        columns["teacher_cosine"] = _cosine(own, theirs).mean(1)
    return {name: values.cpu() for name, values in columns.items()}


def _cosine(left: Tensor, right: Tensor) -> Tensor:
    from torch.nn.functional import cosine_similarity

    return cosine_similarity(left.double(), right.double(), dim=-1)


def ranks_of_pairs(texts: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Rank each text's own pair among all pairs by cosine, int64 [n] from 1; of equal ones, all come before it.

    A vector that is not finite, as of a broken student, finds its pair last.
    """
    ranks = [
        len(pairs) - (cosines < cosines[rows, own][:, None]).sum(1) for rows, own, cosines in _cosines(texts, pairs)
    ]
    return np.concatenate(ranks)


def neighbours(vectors: np.ndarray) -> np.ndarray:
    """Find the k = `NEIGHBOURS` nearest others of each vector by cosine, fewer where there are fewer, int64 [n, k]."""
    count, found = min(NEIGHBOURS, len(vectors) - 1), []
    for rows, own, cosines in _cosines(vectors, vectors):
        cosines[rows, own] = -np.inf
        found.append(np.argpartition(-cosines, max(0, count - 1), axis=1)[:, :count])
    return np.concatenate(found)


def _cosines(left: np.ndarray, right: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield rows and columns of equal places, and the cosines [B, n] of B left vectors with all of the right ones."""
    left, right = _unit(left), _unit(right)
    for start in range(0, len(left), BLOCK):
        cosines = left[start : start + BLOCK] @ right.T
        yield np.arange(len(cosines)), np.arange(start, start + len(cosines)), cosines


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    found: np.ndarray = vectors / np.where(lengths > 0, lengths, 1)
    return found

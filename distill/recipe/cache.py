"""The section `teacher.cache`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from distill.recipe.fields import Count, Mistake, Section

PREDICTIONS, LAYERS = ("logits", "output"), ("hidden", "embeddings")
"""What a term may match that a cache keeps."""


class TeacherCache(Section):
    """The teacher's outputs for the training examples, kept on disk, so that it need not be there in training."""

    keep: Literal["hidden", "topk"] = "hidden"
    """`hidden`: what the output head reads, from which logits are made exactly; of tasks without a vocabulary the
    logits. `topk`: the log-probabilities of the most likely tokens and of all others together."""
    k: Count = 64
    """`topk`: how many tokens."""
    layers: Literal["mapped", "none"] = "mapped"
    """`mapped`: also the outputs of the layers that terms on hidden states compare."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of the states; logits of classes are kept in fp32."""

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse keys without effect."""
        if self.keep != "topk":
            yield from self.without_effect(("k",), f" with keep: {self.keep}")
        elif self.layers == "none":
            yield from self.without_effect(("dtype",), " with keep: topk and layers: none, which keep no states")

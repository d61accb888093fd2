"""What stands in front of texts: prompts of conversations that share rows, of rows with other answers, of a recipe."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.data.tasks.task import Encoder, Ragged
from distill.models.forward import Batch


def last_prompts(batch: Batch) -> list[Tensor | None]:
    """Take the tokens [L] of each conversation up to where its last answer begins; None where nothing stands before."""
    found: list[Tensor | None] = []
    ids, learned, real = (batch[name] for name in ("input_ids", "learned", "attention_mask"))
    documents = batch.get("document_ids", torch.zeros_like(ids))
    for row in range(len(ids)):
        for document in torch.unique(documents[row][real[row].bool()]):
            inside = torch.nonzero(real[row].bool() & (documents[row] == document)).flatten()
            own = learned[row][inside]
            begins = torch.nonzero(own[1:] & ~own[:-1]).flatten() + 1
            found.append(ids[row][inside[: begins[-1]]] if len(begins) else None)
    return found


def answered(prompts: Sequence[Tensor], answers: Sequence[Tensor], sizes: tuple[int, ...]) -> dict[str, Ragged]:
    """Make the features of rows with an answer [T] behind each prompt [L]; the answers are what is learned."""
    pairs = list(zip(prompts, answers, strict=True))
    learned = [torch.cat([torch.zeros_like(prompt), torch.ones_like(answer)]) for prompt, answer in pairs]
    return {"input_ids": Ragged.of([*map(torch.cat, pairs)], sizes), "learned": Ragged.of(learned, sizes)}


def note_prompt(prompt: str, texts: Sequence[str], encoder: Encoder) -> None:
    """Count texts that begin with what is going to be put in front of them."""
    own = prompt.strip()
    twice = sum(text.startswith(own) for text in texts) if own else 0
    encoder.note(f"texts that begin with {own!r} before it is put in front of them", twice)

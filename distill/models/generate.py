"""Let a model write texts of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, EncoderDecoderCache, GenerationConfig, StaticCache

from distill.models.forward import Batch, model_inputs


@torch.no_grad()
def write_greedily(model: Any, batch: Batch, limit: int, **settings: Any) -> Tensor:
    """Let an encoder-decoder write a text for each source, at most `limit` tokens, the likeliest one each time.

    Forced tokens, shortest lengths and the like are those of the model's own generation config, `settings` go before.

    Returns:
        Token ids [B, T], with special tokens.
    """
    source = {name: tensor for name, tensor in model_inputs(batch).items() if not name.startswith("decoder_")}
    own = {"max_new_tokens": limit, "max_length": None, "do_sample": False, "num_beams": 1, **settings}
    return cast("Tensor", model.generate(**source, **own))


@dataclass(frozen=True)
class Writing:
    """The way in which a model answers prompts: by its own predictions, with nothing that bends them."""

    max_new_tokens: int
    temperature: float
    """0: the likeliest token each time."""
    ends: frozenset[int]
    """Tokens that end an answer."""
    padding: int
    length: int | None = None
    """Tokens that prompt and answer may have together; None: they are two texts."""
    vocabulary: int | None = None
    """Entries of the vocabulary that are tokens; a padded head has more, which are never written."""
    first: int | None = None
    """Token that every answer begins with, as that of a language; None: none."""

    def room(self, prompt: Tensor) -> int:
        """Count the tokens that the answer to a prompt may have."""
        return min(self.max_new_tokens, self.length - len(prompt)) if self.length else self.max_new_tokens

    @torch.no_grad()
    def __call__(self, model: Any, prompts: Sequence[Tensor]) -> list[Tensor]:
        """Let a model in eval mode answer prompts, of token ids [L] each; returns the answers, [T] each, on the host.

        An answer ends with the first of the `ends`, or where its room does.
        """
        text = model.config.get_text_config(decoder=True)
        positions = getattr(text, "max_position_embeddings", None) or float("inf")
        entries = getattr(text, "decoder_vocab_size", None) or text.vocab_size
        together: dict[int, list[int]] = {}
        for number, prompt in enumerate(prompts):
            # In one call all write as long as the last; nothing may get a position that the model does not have.
            free = self.length is None or len(prompt) + self.max_new_tokens <= positions
            together.setdefault(self.max_new_tokens if free else self.room(prompt), []).append(number)
        answers: dict[int, Tensor] = {}
        for numbers in together.values():
            own = [prompts[number] for number in numbers]
            rooms = [*map(self.room, own)]
            written = self._write(model, own, max(rooms), entries)
            answers |= zip(numbers, map(self._until_end, written, rooms), strict=True)
        return [answers[number] for number in range(len(prompts))]

    def _write(self, model: Any, prompts: Sequence[Tensor], tokens: int, entries: int) -> Tensor:
        """Return the tokens that a model writes, [B, T]."""
        two_stacks = model.config.is_encoder_decoder
        side = "right" if two_stacks else "left"
        ids = pad_sequence(list(prompts), True, self.padding, side)
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, 0, side)
        drawn = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        settings = GenerationConfig(
            max_new_tokens=tokens,
            pad_token_id=self.padding,
            eos_token_id=sorted(self.ends) or None,
            forced_bos_token_id=self.first,
            decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
            suppress_tokens=[*range(self.vocabulary or entries, entries)] or None,
            disable_compile=True,
            **(drawn if self.temperature else {"do_sample": False}),
        )
        with _without_own_settings(model):
            found = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                past_key_values=_cache_for(model, ids.shape[1], tokens),
                generation_config=settings,
            )
        return cast("Tensor", found[:, 1 if two_stacks else ids.shape[1] :].cpu())

    def _until_end(self, row: Tensor, room: int) -> Tensor:
        """Cut what was written behind the token that ends it."""
        row = row[:room]
        ends = torch.isin(row, torch.tensor(sorted(self.ends), dtype=row.dtype)).nonzero().flatten()
        return row[: int(ends[0]) + 1] if len(ends) else row


class _Cache(StaticCache):  # type: ignore[misc]  # transformers is loaded lazily
    """Keys and values of one dtype: under autocast a rotation leaves keys in fp32 beside values in less."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **named: Any) -> Any:
        return super().update(key_states.to(value_states.dtype), value_states, *args, **named)


def _cache_for(model: Any, read: int, tokens: int) -> Cache:
    """Make a cache for so many tokens that are read and written, and no more: a longer one sums in another order."""
    config = model.config.get_text_config(decoder=True)
    if not model.config.is_encoder_decoder:
        return _Cache(config, read + tokens)
    return EncoderDecoderCache(_Cache(config, 1 + tokens), _Cache(config, read))


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """Take a model's generation config away during the block: penalties and the like would go into what it writes."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def end_tokens(model: Any, others: Iterable[int | None]) -> frozenset[int]:
    """List the tokens that end what a model writes: those of its configs, and others."""
    given = [getattr(config, "eos_token_id", None) for config in (model.config, model.generation_config)]
    flat = [*others, *(token for each in given for token in (each if isinstance(each, list) else [each]))]
    return frozenset(token for token in flat if token is not None)

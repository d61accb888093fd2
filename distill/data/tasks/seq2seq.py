"""A target text for each source text, written by a decoder that sees all of the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from distill.data.tasks.prompts import note_prompt
from distill.data.tasks.task import TEXT, Column, Encoder, Features, Ragged, Seeds, Task, Values, read_text
from distill.errors import InputError
from distill.models.forward import UNLABELLED, Batch, Outputs
from distill.models.generate import write_greedily
from distill.models.load import ModelHead, load_config
from distill.recipe.schema import Data


def read_target(value: Any) -> str | None:
    """Accept text; a blank one is no target."""
    return read_text(value) if read_text(value).strip() else None


TARGET = Column(read_target, answer=True, plain=True)


class WritesText(Task):
    """A decoder writes the target: what tasks with an encoder and a decoder have in common."""

    head = "seq2seq"
    observed = ("generated", "target_text")
    target = "target_ids"

    def bind(self, teacher: Path, tokenizer: Any, spec: Data) -> Task:
        """Take the tokenizer, and the token that the decoder starts with."""
        config = load_config(teacher, ModelHead(""))
        self.start = getattr(config, "decoder_start_token_id", None)
        if not getattr(config, "is_encoder_decoder", False) or self.start is None:
            raise InputError(f"{teacher / 'config.json'} is of no encoder-decoder: it has no decoder_start_token_id")
        self.tokenizer, self.limit = tokenizer, spec.max_target_length or spec.max_length
        self.most_written = self.limit
        self.settings: dict[str, Any] = {}
        """Of generation."""
        return self

    def vocabulary(self, tokenizer: Any) -> int:
        """Count the tokens of targets, where Marian's tokenizer has others for them."""
        return len(tokenizer.target_encoder if getattr(tokenizer, "separate_vocabs", False) else tokenizer)

    def encode_targets(self, texts: Sequence[str], encoder: Encoder) -> list[list[int]]:
        """Encode targets as the tokenizer writes them, with an end token and without the decoder's start token."""
        encoded, cut = encoder.targets(texts, self.limit)
        end = encoder.tokenizer.eos_token_id
        found = []
        for ids in encoded:
            own = list(ids[1:] if ids[:1] == [self.start] != [end] else ids)
            if end is not None and end not in own:
                own = [*own[: self.limit - 1], end]
                encoder.note("targets given the end token that the tokenizer does not write")
            found.append(own)
        encoder.note(f"targets cut to {self.limit} tokens", cut)
        return found

    def target_features(self, texts: Sequence[str], kept: list[int], encoder: Encoder) -> Features:
        """List the features of the rows that are kept, all but those of their sources."""
        ids = self.encode_targets(texts, encoder) if kept else []
        return {self.target: ids, "target_text": list(texts), "labelled": [True] * len(kept), "row": kept}

    def collate(self, examples: Mapping[str, Any], padding: int, seeds: Seeds) -> Batch:
        """Add the target as labels [B, T]."""
        targets: Ragged = examples[self.target]
        return {**self.read_source(examples, padding, seeds), "labels": torch.from_numpy(targets.pad(UNLABELLED))}

    def read_source(self, examples: Mapping[str, Any], padding: int, seeds: Seeds) -> Batch:
        """Make what the encoder reads."""
        return super().collate(examples, padding, seeds)

    def observe(self, model: Any, _outputs: Outputs, batch: Batch, examples: Mapping[str, Any]) -> dict[str, Any]:
        """Write a text for each example, the likeliest token after the other."""
        ids = write_greedily(model, batch, self.most_written, **self.settings)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        columns = {"generated": texts, "target_text": examples["target_text"]}
        return {name: np.asarray([text.strip() for text in own], dtype=np.str_) for name, own in columns.items()}


class Seq2Seq(WritesText):
    """Translation, summaries, spelling to sounds: models such as T5, BART and Marian."""

    name = "seq2seq"
    auto_class = "AutoModelForSeq2SeqLM"
    columns: ClassVar = {"source": TEXT, "target": TARGET}
    prompted = True

    def bind(self, teacher: Path, tokenizer: Any, spec: Data) -> Task:
        """Take the language of the target, too, where the tokenizer has one and targets begin with it."""
        super().bind(teacher, tokenizer, spec)
        language = getattr(tokenizer, "tgt_lang", None)
        if language and tokenizer(text_target="a")["input_ids"][0] == tokenizer.convert_tokens_to_ids(language):
            self.settings = {"forced_bos_token_id": tokenizer.convert_tokens_to_ids(language)}
        return self

    def encode(self, rows: Values, encoder: Encoder) -> Features:
        """Encode sources, with their prefix, and targets; rows without a target teach nothing and are left out."""
        kept = [row for row, text in enumerate(rows["target"]) if text is not None]
        encoder.note("rows left out that have no target", len(rows["target"]) - len(kept))
        prefix = encoder.spec.prefix or ""
        note_prompt(prefix, [rows["source"][row] for row in kept], encoder)
        sources = [prefix + rows["source"][row] for row in kept]
        ids = encoder(sources)["input_ids"] if kept else []
        return {"input_ids": ids, **self.target_features([rows["target"][row] for row in kept], kept, encoder)}

    def prompts(self, batch: Batch) -> list[torch.Tensor | None]:
        """Take the source texts."""
        return [ids[real.bool()] for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)]

    def with_answers(self, prompts: Sequence[torch.Tensor], answers: Sequence[torch.Tensor], **given: Any) -> Batch:
        """Make the answers the targets."""
        parts = {"input_ids": prompts, self.target: answers}
        return self.collate(
            {name: Ragged.of(rows, given["sizes"]) for name, rows in parts.items()}, given["padding"], ()
        )

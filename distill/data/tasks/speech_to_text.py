"""The text of speech, written by the decoder of a Whisper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AutoFeatureExtractor, GenerationConfig

from distill.data.sound import FULL, read_sound
from distill.data.tasks.seq2seq import TARGET, WritesText
from distill.data.tasks.task import Column, Encoder, Features, Ragged, Seeds, Task, Values
from distill.errors import InputError
from distill.files import sha256_of
from distill.models.forward import Batch
from distill.models.load import ModelHead, load_config
from distill.models.weights import as_input_error
from distill.recipe.schema import Data

PREPROCESSOR = "preprocessor_config.json"


def read_file(value: Any) -> str:
    """Accept the path of a file that is there."""
    if not isinstance(value, str) or not value:
        raise ValueError("is no path of a sound file")
    if not Path(value).is_file():
        raise ValueError("names no file")
    return value


class SpeechToText(WritesText):
    """Sound is kept as samples; what the encoder reads of it is computed for each batch."""

    name = "speech_to_text"
    auto_class = "AutoModelForSpeechSeq2Seq"
    columns: ClassVar = {
        "audio": Column(read_file, plain=True, content=lambda path: sha256_of(Path(path))),
        "text": TARGET,
    }
    block = 32
    target = "input_ids"

    def bind(self, teacher: Path, tokenizer: Any, spec: Data) -> Task:
        """Take the feature extractor, and make the tokenizer write the language that the texts are in."""
        super().bind(teacher, tokenizer, spec)
        with as_input_error(f"{teacher} has no usable {PREPROCESSOR}"):
            self.extractor = AutoFeatureExtractor.from_pretrained(teacher, local_files_only=True)
        config = load_config(teacher, ModelHead(""))
        made = (self.extractor.feature_size, getattr(self.extractor, "nb_max_frames", None))
        read = (getattr(config, "num_mel_bins", None), 2 * getattr(config, "max_source_positions", 0))
        if made != read:
            raise InputError(f"{teacher}: {PREPROCESSOR} gives {made} bands and frames, the model reads {read}")
        self.preprocessors = [self.extractor]
        self.settings = self._choose_language(teacher, tokenizer, spec)
        start = tokenizer(text_target="")["input_ids"]
        self.longest = self.extractor.n_samples
        self.most_written = max(1, spec.max_length - len(start))
        return self

    def _choose_language(self, teacher: Path, tokenizer: Any, spec: Data) -> dict[str, str]:
        """Set the tokenizer's language; returns the options of generation that do the same."""
        file = teacher / "generation_config.json"
        generation = GenerationConfig.from_pretrained(teacher, local_files_only=True) if file.is_file() else None
        language = spec.language or getattr(generation, "language", None) or getattr(tokenizer, "language", None)
        if not getattr(generation, "is_multilingual", False):
            if spec.language is not None and getattr(tokenizer, "language", None) != spec.language:
                raise InputError(f"data.language: the teacher in {teacher} is not multilingual; remove the key")
            return {}
        if language is None:
            raise InputError(f"data.language: the teacher in {teacher} knows many; say which one the texts are in")
        own = {"language": language, "task": getattr(generation, "task", None) or "transcribe"}
        with as_input_error("data.language"):
            tokenizer.set_prefix_tokens(**own)
        return own

    def encode(self, rows: Values, encoder: Encoder) -> Features:
        """Read sounds and encode texts; what the encoder cannot hear to its end is left out."""
        kept, sounds = [], []
        for row, (path, text) in enumerate(zip(rows["audio"], rows["text"], strict=True)):
            sound = read_sound(Path(path), self.extractor.sampling_rate, encoder.notes)
            if text is None:
                encoder.note("sounds left out that have no text")
            elif not len(sound):
                encoder.note("sounds left out that are empty")
            elif len(sound) > self.longest:
                longest = f"{self.longest / self.extractor.sampling_rate:g} s"
                encoder.note(f"sounds left out that are longer than {longest}")
            else:
                kept.append(row)
                sounds.append(sound)
        encoder.examples += len(kept)
        return {"sound": sounds, **self.target_features([rows["text"][row] for row in kept], kept, encoder)}

    def read_source(self, examples: Mapping[str, Any], _padding: int, _seeds: Seeds) -> Batch:
        """Compute what the encoder reads: log-mel bands `input_features` [B, M, frames], and the mask of frames."""
        sounds: Ragged = examples["sound"]
        given = [sound.astype(np.float32) / FULL for sound in sounds]
        options = {"sampling_rate": self.extractor.sampling_rate, "return_attention_mask": True}
        found = self.extractor(given, return_tensors="np", **options)
        return {name: torch.from_numpy(found[name]) for name in ("input_features", "attention_mask")}

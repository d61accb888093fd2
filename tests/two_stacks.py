"""Tiny projects for tasks with an encoder and a decoder: teacher folder, rows and recipe."""

from __future__ import annotations

import json
import random
import wave

import numpy as np
from tiny import tiny_config
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor, WhisperTokenizer

LETTERS, CHINESE = "abcdefgh", "猫吃鱼狗跑山水火"
RECIPE = """\
name: tiny
seed: 3
teacher:
  model: ./teacher
  init: random
  fit: {steps: 140, batch_size: 16, lr: 2e-3}
student:
  layers: {keep: 2, choose: every}
  encoder_layers: {keep: 2, choose: every}
  mlp: {keep: 0.5, multiple_of: 8}
  calibration: {examples: 16, batch_size: 8}
data: {source: ./data.jsonl, task: seq2seq, max_length: 12}
losses:
  - {match: logits}
  - {match: hidden, weight: 0.1}
training: {steps: 40, batch_size: 16, lr: 3e-3}
evaluation: {batch_size: 32, arms: [teacher, cut, distilled], efficiency: false}
release: {license: apache-2.0}
"""


def symbols_tokenizer(symbols, *, between=" ", writes="$A </s>"):
    """One token per symbol, with `between` between them; `writes` says what comes around a text."""
    specials = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*specials, *symbols])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = (
        pre_tokenizers.WhitespaceSplit() if between else pre_tokenizers.Split("", behavior="isolated")
    )
    if not between:
        tokenizer.decoder = decoders.Fuse()
    known = [(word, tokenizer.token_to_id(word)) for word in ("</s>", symbols[-1])]
    tokenizer.post_processor = processors.TemplateProcessing(single=writes, special_tokens=known)
    own = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **own)


def text_project(folder, family, symbols=LETTERS, between=" ", **changes):
    """Every symbol becomes the next one: `a b` -> `b c`; returns the recipe. `changes` are those of the config."""
    symbols_tokenizer(symbols, between=between).save_pretrained(folder / "teacher")
    names = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "decoder_start_token_id": 0}
    tiny_config(family, **names, **changes).save_pretrained(folder / "teacher")
    after = dict(zip(symbols, symbols[1:] + symbols[:1], strict=True))
    chooser = random.Random(0)
    texts = {"".join(chooser.choices(symbols, k=chooser.randint(3, 4))) for _ in range(300)}
    rows = [{"source": between.join(text), "target": between.join(map(after.get, text))} for text in sorted(texts)]
    return write_project(folder, rows, RECIPE)


def write_project(folder, rows, recipe):
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(recipe)
    return folder / "recipe.yaml"


RATE = 16_000


def tone(hertz, seconds=0.15, rate=RATE):
    """A tone that fades in and out, in [-1, 1]."""
    count = round(seconds * rate)
    return np.sin(2 * np.pi * hertz * np.arange(count) / rate) * np.hanning(count)


def write_wave(path, samples, rate=RATE):
    """Samples [n] or [n, channels] in [-1, 1] as 16-bit numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).round().astype("<i2").tobytes())
    return path


def whisper_folder(folder, **changes):
    """A whisper for one second of sound, its tokenizer with one token per letter, and its feature extractor."""
    letters = {letter: number for number, letter in enumerate([*LETTERS, "\u0120"])}  # the last one is a space
    names = ["startoftranscript", "en", "translate", "transcribe", "nospeech", "notimestamps"]
    special = [AddedToken(f"<|{name}|>", special=True, normalized=False) for name in names]
    tokenizer = WhisperTokenizer(vocab=letters, merges=[], extra_special_tokens=special)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    end, start = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("endoftext", "startoftranscript"))
    names = {"pad_token_id": end, "eos_token_id": end, "bos_token_id": end, "decoder_start_token_id": start}
    sizes = {"vocab_size": len(tokenizer), "max_source_positions": 50, "max_target_positions": 300}
    tiny_config("whisper", **{**names, **sizes, **changes}).save_pretrained(folder)


def speech_project(folder, recipe=RECIPE):
    """Each letter is a tone: a text of one to five letters is heard as that many tones; returns the recipe."""
    whisper_folder(folder / "teacher")
    chooser, rows = random.Random(0), []
    for text in sorted({"".join(chooser.choices(LETTERS, k=chooser.randint(1, 5))) for _ in range(150)}):
        sound = np.concatenate([tone(300 + 500 * LETTERS.index(letter)) for letter in text])
        write_wave(folder / "sounds" / f"{text}.wav", 0.6 * sound)
        rows.append({"audio": f"sounds/{text}.wav", "text": " ".join(text)})
    own = recipe.replace("task: seq2seq, max_length: 12", "task: speech_to_text, max_length: 16")
    return write_project(folder, rows, own)

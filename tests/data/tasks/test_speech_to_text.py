"""The task `speech_to_text`: sounds and texts as a Whisper hears and writes them, and a run to the release."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, WhisperFeatureExtractor
from two_stacks import RECIPE, speech_project, tone, whisper_folder, write_project, write_wave

from distill.cli import main
from distill.data.sources import source_fingerprint
from distill.data.tasks.speech_to_text import SpeechToText
from distill.data.tasks.task import Encoder, Ragged, Settled
from distill.errors import InputError
from distill.models.load import load_tokenizer
from distill.recipe.data import Data, Source


def bound(folder, **settings):
    tokenizer, spec = load_tokenizer(folder), Data(source="./x.jsonl", task="speech_to_text", **settings)
    return SpeechToText().bind(folder, tokenizer, spec), Encoder(tokenizer, spec, Settled("seq2seq"))


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    whisper_folder(folder)
    return folder


def test_sounds_that_cannot_be_heard_whole_and_rows_without_text_are_left_out_and_counted(whisper, tmp_path):
    task, encoder = bound(whisper, max_length=6)
    sounds = {"a": tone(440), "long": np.zeros(16_001), "whole": np.zeros(16_000), "empty": np.zeros(0)}
    paths = {name: str(write_wave(tmp_path / f"{name}.wav", sound)) for name, sound in sounds.items()}
    names = ["a", "long", "whole", "empty", "a"]
    rows = {"audio": [paths[name] for name in names], "text": ["a b", "a", "a b c d e", "a", None]}
    found = task.encode(rows, encoder)
    first, end, plain = encoder.tokenizer.convert_tokens_to_ids(["a", "<|endoftext|>", "<|notimestamps|>"])
    space = encoder.tokenizer.convert_tokens_to_ids("\u0120")
    # The start token is not among the labels: the model's own rule puts it in front of what the decoder reads.
    assert found["input_ids"] == [[plain, first, space, first + 1, end]] * 2
    assert (found["row"], [len(each) for each in found["sound"]]) == ([0, 2], [2400, 16_000])
    assert dict(encoder.notes) == {
        "sounds left out that are longer than 1 s": 1,
        "sounds left out that are empty": 1,
        "sounds left out that have no text": 1,
        "targets cut to 6 tokens": 1,
        "sounds in which nothing is heard": 2,
    }


def test_features_are_those_of_the_teachers_extractor_with_a_mask_of_what_is_sound(whisper):
    task, _ = bound(whisper)
    sounds = [(tone(440) * 2**15).astype(np.int16), np.zeros(16_000, np.int16)]
    lists = Ragged(np.concatenate(sounds), np.array([len(sound) for sound in sounds]))
    batch = task.collate({"sound": lists, "input_ids": lists}, 0, [])
    extractor = WhisperFeatureExtractor.from_pretrained(whisper)
    expected = extractor([sound / 2**15 for sound in sounds], sampling_rate=16_000, return_tensors="pt")
    assert torch.allclose(batch["input_features"], expected.input_features, atol=1e-5)
    assert batch["input_features"].shape == (2, 8, 100)
    assert batch["attention_mask"].sum(1).tolist() == [15, 100]


def test_the_language_is_written_as_the_teacher_is_told_to(tmp_path):
    whisper_folder(tmp_path)
    with pytest.raises(InputError, match=r"data.language: the teacher in .* is not multilingual"):
        bound(tmp_path, language="english")
    many = {"is_multilingual": True, "lang_to_id": {"<|en|>": 11}, "task_to_id": {"transcribe": 13}}
    GenerationConfig(**many).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"data.language: the teacher in .* knows many"):
        bound(tmp_path)
    task, encoder = bound(tmp_path, language="english")
    assert task.settings == {"language": "english", "task": "transcribe"}
    (ids,) = task.encode_targets(["a"], encoder)
    tokens = encoder.tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["<|en|>", "<|transcribe|>", "<|notimestamps|>", "a", "<|endoftext|>"]
    with pytest.raises(InputError, match=r"data.language"):
        bound(tmp_path, language="klingon")


def test_an_extractor_that_is_not_the_models_is_refused(tmp_path):
    whisper_folder(tmp_path, max_source_positions=49)
    with pytest.raises(InputError, match=r"gives \(8, 100\) bands and frames, the model reads \(8, 98\)"):
        bound(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"has no usable preprocessor_config.json"):
        bound(tmp_path)


def test_a_sound_that_changes_is_read_anew(tmp_path):
    path = write_wave(tmp_path / "sounds" / "x.wav", tone(440))
    write_project(tmp_path, [{"audio": "sounds/x.wav", "text": "a"}], RECIPE)
    source = Source(source="./data.jsonl")
    before = source_fingerprint(source, "train", tmp_path, ["audio"])
    assert source_fingerprint(source, "train", tmp_path, ["audio"]) == before
    write_wave(path, tone(450))
    os.utime(path, (0, 0))
    assert source_fingerprint(source, "train", tmp_path, ["audio"]) != before


def test_a_sound_that_is_not_there_is_named_with_its_line(tmp_path, capsys):
    recipe = speech_project(tmp_path)
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(json.dumps({"audio": "sounds/none.wav", "text": "a"}) + "\n")
    assert main(["run", str(recipe), "--out", str(tmp_path / "run")]) == 2
    assert "column 'audio' names no file" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_student_is_cut_distilled_and_released(tmp_path):
    recipe, run = speech_project(tmp_path), tmp_path / "run"
    own = ["evaluation.efficiency=true", "training.freeze=['model.encoder.*']"]
    assert main(["run", str(recipe), "--out", str(run), *own]) == 0
    table = json.loads((run / "evaluation.json").read_text())
    arms = {arm["name"]: arm["metrics"] for arm in table["arms"]}
    assert arms["distilled"]["kl"] < 0.5 * arms["cut"]["kl"]
    assert arms["distilled"]["perplexity"] < arms["cut"]["perplexity"]
    assert arms["distilled"]["wer"] <= arms["cut"]["wer"]
    protocol = table["efficiency"]["protocol"]
    assert (protocol["frames"], protocol["target_length"]) == (100, 16)
    assert "# a second of silence;" in (card := (run / "release/README.md").read_text()) and "\nIt prints" in card
    line = (
        "import sys, numpy; from transformers import pipeline; sound = numpy.sin(numpy.arange(4800) / 5); "
        "print(pipeline('automatic-speech-recognition', sys.argv[1])(sound)['text']); "
        "assert 'distill' not in sys.modules"
    )
    used = subprocess.run([sys.executable, "-I", "-c", line, run / "release"], capture_output=True, text=True)
    assert used.returncode == 0, used.stderr
    assert set(used.stdout.strip()) <= {*"abcdefgh "}

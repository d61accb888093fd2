"""Sound files as samples."""

from __future__ import annotations

import importlib.util
import struct
import wave
from collections import Counter

import numpy as np
import pytest
from two_stacks import tone, write_wave

from distill.data.sound import read_sound, resample
from distill.errors import InputError


@pytest.mark.parametrize(
    ("width", "raw"),
    [
        (1, bytes([128, 192, 0])),  # unsigned, around 128
        (2, struct.pack("<3h", 0, 2**14, -(2**15))),
        (3, bytes([0, 0, 0, 0, 0, 0x40, 0, 0, 0x80])),
        (4, struct.pack("<3i", 0, 2**30, -(2**31))),
    ],
)
def test_samples_of_any_width_are_read_as_sixteen_bits(tmp_path, width, raw):
    with wave.open(str(tmp_path / "x.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(16_000)
        file.writeframes(raw)
    notes: Counter[str] = Counter()
    found = read_sound(tmp_path / "x.wav", 16_000, notes)
    assert found.dtype == np.int16
    assert (found.tolist(), dict(notes)) == ([0, 2**14, -(2**15)], {})


def test_channels_are_mixed_down_and_other_rates_resampled_and_both_are_counted(tmp_path):
    both = np.stack([tone(440, rate=44_100), np.zeros(6615)], axis=1)
    notes: Counter[str] = Counter()
    found = read_sound(write_wave(tmp_path / "x.wav", both, rate=44_100), 16_000, notes)
    assert notes == {
        "sounds of 2 channels mixed down to one": 1,
        "sounds resampled from 44,100 to 16,000 Hz": 1,
    }
    assert len(found) == 2400
    assert np.abs(found / 2**15 - 0.5 * tone(440)).max() < 1e-3


@pytest.mark.parametrize(("size", "cut"), [(None, True), (0xFFFFFFFF, False)])
def test_a_sound_that_was_not_copied_whole_is_counted_and_one_from_a_pipe_is_whole(tmp_path, size, cut):
    path = write_wave(tmp_path / "x.wav", tone(440))
    content = path.read_bytes()
    if size is not None:  # as ffmpeg writes it, which cannot know how long it will be
        content = content[:40] + struct.pack("<I", size) + content[44:]
    path.write_bytes(content[:-1000])
    notes: Counter[str] = Counter()
    assert len(read_sound(path, 16_000, notes)) == 2400 - 500
    assert notes == ({"sounds that end before their header says": 1} if cut else {})


def test_a_sound_of_nothing_is_counted(tmp_path):
    notes: Counter[str] = Counter()
    read_sound(write_wave(tmp_path / "x.wav", np.zeros(100)), 16_000, notes)
    assert notes == {"sounds in which nothing is heard": 1}
    against = np.stack([tone(440), -tone(440)], axis=1)  # as microphones with a wire turned round record it
    assert not read_sound(write_wave(tmp_path / "y.wav", against), 16_000, notes).any()
    assert notes["sounds in which nothing is heard"] == 2


def test_resampling_removes_what_the_new_rate_cannot_hold():
    high, low = tone(12_000, rate=32_000), tone(1_000, rate=32_000)
    assert np.abs(resample(high, 32_000, 16_000)).max() < 1e-3
    assert np.abs(resample(high + low, 32_000, 16_000) - tone(1_000)).max() < 1e-3
    assert np.abs(resample(tone(1_000), 16_000, 32_000) - low).max() < 1e-3


def test_files_of_other_kinds_are_read_with_soundfile_and_broken_ones_refused(tmp_path):
    flac, broken = tmp_path / "x.flac", tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    if importlib.util.find_spec("soundfile") is None:
        with pytest.raises(InputError, match=r"broken.wav is no .wav file .* pip install 'distill\[speech\]'"):
            read_sound(broken, 16_000, Counter())
        return
    import soundfile

    soundfile.write(flac, tone(440), 16_000)
    assert np.abs(read_sound(flac, 16_000, Counter()) / 2**15 - tone(440)).max() < 1e-3
    with pytest.raises(InputError, match=r"broken.wav is no sound file"):
        read_sound(broken, 16_000, Counter())
    notes: Counter[str] = Counter()
    for number, (samples, found) in enumerate((([0.5, 3.0, -2.0], [2**14, 2**15 - 1, -(2**15)]), ([0.5], [2**14]))):
        soundfile.write(tmp_path / f"{number}.wav", np.array(samples), 16_000, subtype="FLOAT")
        assert read_sound(tmp_path / f"{number}.wav", 16_000, notes).tolist()[1:] == found[1:]
    assert notes["sounds with samples beyond the loudest that there is, which are cut off"] == 1
    for number in (np.nan, np.inf):
        soundfile.write(tmp_path / "x.wav", np.array([0.5, number]), 16_000, subtype="FLOAT")
        with pytest.raises(InputError, match=r"x\.wav holds samples that are no finite numbers"):
            read_sound(tmp_path / "x.wav", 16_000, notes)

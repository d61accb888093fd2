"""Sound files as samples: one channel, at the rate that a model was made for, 16 bits each."""

from __future__ import annotations

import importlib.util
import wave
from collections import Counter
from pathlib import Path

import numpy as np

from distill.errors import InputError

FULL = 2**15
"""Loudest 16-bit sample, plus one."""
UNKNOWN_SIZE = 2**30
"""Bytes of sound from which on a header does not mean what it says: that of a file which was written into a pipe."""


def read_sound(path: Path, rate: int, notes: Counter[str]) -> np.ndarray:
    """Read a sound file, int16 [samples].

    Args:
        path: A `.wav` file with whole numbers, or any file that the package soundfile reads.
        rate: Samples per second that are wanted; others are resampled.
        notes: Counts what was done to it.

    Raises:
        InputError: It is broken, of a kind that is not known, or of one that needs a package.
    """
    try:
        samples, have = _read_wave(path, notes)
    except (OSError, EOFError, ValueError, wave.Error) as error:
        samples, have = _read_other(path, error)
    if not np.isfinite(samples).all():
        raise InputError(f"{path} holds samples that are no finite numbers; make the file anew, or remove its row")
    if np.abs(samples).max(initial=0) > 1:
        notes["sounds with samples beyond the loudest that there is, which are cut off"] += 1
    if samples.shape[1] > 1:
        notes[f"sounds of {samples.shape[1]} channels mixed down to one"] += 1
    mono = samples.mean(axis=1)
    if len(mono) and np.ptp(mono) == 0:
        notes["sounds in which nothing is heard"] += 1
    if have != rate and len(mono):
        notes[f"sounds resampled from {have:,} to {rate:,} Hz"] += 1
        mono = resample(mono, have, rate)
    whole: np.ndarray = np.clip(np.rint(mono * FULL), -FULL, FULL - 1).astype(np.int16)
    return whole


def _read_wave(path: Path, notes: Counter[str]) -> tuple[np.ndarray, int]:
    """Read samples [n, channels] in [-1, 1) and their rate from a file of 8, 16, 24 or 32 bits per sample."""
    with wave.open(str(path), "rb") as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        expected = file.getnframes() * width * channels
        raw = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
    if len(raw) < expected < UNKNOWN_SIZE:
        notes["sounds that end before their header says"] += 1
    raw = raw[: len(raw) // (width * channels) * width * channels].reshape(-1, channels, width)
    if width == 1:  # the only unsigned kind
        return (raw[..., 0].astype(np.float64) - 128) / 128, rate
    wide = np.zeros((*raw.shape[:2], 4), np.uint8)
    wide[..., 4 - width :] = raw
    samples: np.ndarray = wide.view("<i4")[..., 0] / 2.0**31
    return samples, rate


def _read_other(path: Path, error: Exception) -> tuple[np.ndarray, int]:
    if importlib.util.find_spec("soundfile") is None:
        raise InputError(
            f"{path} is no .wav file of whole numbers ({error or type(error).__name__}); other kinds need the package "
            f"soundfile: pip install 'distill[speech]'"
        ) from error
    import soundfile

    try:
        return soundfile.read(path, dtype="float64", always_2d=True)  # type: ignore[no-any-return]
    except (OSError, RuntimeError, TypeError) as broken:
        raise InputError(f"{path} is no sound file: {broken}") from broken


def resample(samples: np.ndarray, have: int, want: int) -> np.ndarray:
    """Change the rate of a sound [n] by its spectrum, with nothing above half of either rate; keeps its duration."""
    length = max(1, round(len(samples) * want / have))
    spectrum = np.fft.rfft(samples)
    kept = np.zeros(length // 2 + 1, spectrum.dtype)
    shared = min(len(kept), len(spectrum))
    kept[:shared] = spectrum[:shared]
    found: np.ndarray = np.fft.irfft(kept, length) * (length / len(samples))
    return found

"""Speak texts with espeak-ng: 16 kHz mono wav files and JSON-lines files that name them, split by text.

    apt-get install espeak-ng && python scripts/data/spoken_texts.py --out data/speech
    python scripts/data/spoken_texts.py --texts sentences.txt --voices en-us en-gb+f3 --out data/speech

Writes wav/, and train.jsonl, validation.jsonl and test.jsonl with the columns audio, the path of a wav file from the
folder of the .jsonl file, and text. `--texts` has a text per line, or per row of a .jsonl file in its column text;
without it, sentences of Python's help and docstrings are spoken. Kept are texts of 3 words to `--most-words`, made of
letters, with commas, semicolons or colons between words and a full stop at the end, since they are read out as they are
written. The voices take turns, by the hash of the text.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import wave
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from split_by_key import SPLITS, Keyed, exit_code_of, fraction, lines_of, parser_of, write_readme, write_splits

from distill.errors import InputError, RunError

RATE = 16_000
"""Samples per second that are written."""
SENTENCE = re.compile(r"{0}(?:[,;:]? {0})*\.?".format("[A-Za-z]+(?:['-][A-Za-z]+)*"))


def main() -> None:
    """Choose texts, then speak what is in the splits."""
    parser = parser_of(__doc__, limit=400, held_out_limit=100)
    parser.add_argument("--texts", type=Path, help=".txt with a text per line, or .jsonl with a column text")
    parser.add_argument("--voices", nargs="+", default=["en-us", "en-gb", "en-us+f3", "en-gb+m3"], help="of espeak-ng")
    parser.add_argument("--most-words", type=int, default=12, help="words in a text at most")
    options = parser.parse_args()
    if shutil.which("espeak-ng") is None:
        raise InputError(
            "espeak-ng is not installed: `apt-get install espeak-ng`, or your system's package of that name"
        )
    for voice in options.voices:
        speak("a", voice)
    notes: Counter[str] = Counter()
    texts = read_texts(options.texts) if options.texts else library_sentences()
    rows = suitable(texts, options.most_words, notes)
    said = write_splits(options.out, rows, "audio", options, notes)
    seconds = speak_splits(options.out, options.voices)
    said += [f"speech: {seconds / 60:.1f} minutes, voices {', '.join(options.voices)}"]
    print(f"  {said[-1]}")
    about = f"Texts: {options.texts or 'of Python, PSF licence'}. Spoken by espeak-ng, which claims no rights in that."
    write_readme(options.out, "Spoken texts", about, __doc__, {"rows": said})


def read_texts(path: Path) -> Iterator[str]:
    """Read a text per line or row."""
    for number, line in enumerate(lines_of(path, "--texts"), start=1):
        if path.suffix != ".jsonl":
            yield line
            continue
        try:
            yield str(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: line {number} is no JSON object with a column text") from error


def library_sentences() -> Iterator[str]:
    """Cut the topics of Python's help, and the first paragraphs of the library's docstrings, into sentences."""
    from distill.data.builtin import pydoc_topics, stdlib_docstrings

    for text in [*pydoc_topics()["text"], *stdlib_docstrings()["text"]]:
        yield from re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(text.split()))


def suitable(texts: Iterator[str], most_words: int, notes: Counter[str]) -> Iterator[Keyed]:
    """Yield the texts that are read out as they are written."""
    for text in map(str.strip, texts):
        if not SENTENCE.fullmatch(text):
            notes["texts with digits, brackets or other signs"] += 1
        elif not 3 <= len(text.split()) <= most_words:
            notes[f"texts of fewer than 3 or more than {most_words} words"] += 1
        else:
            name = hashlib.sha256(text.encode()).hexdigest()[:16]
            yield (text.lower(),), {"audio": f"wav/{name}.wav", "text": text}


def speak_splits(folder: Path, voices: list[str]) -> float:
    """Write the wav file of each row, and return the seconds of all."""
    samples = 0
    (folder / "wav").mkdir(exist_ok=True)
    for name in SPLITS:
        for row in map(json.loads, lines_of(folder / f"{name}.jsonl", "--out")):
            signal = speak(row["text"], voices[int(fraction(f"voice {row['text']}") * len(voices))])
            write_wav(folder / row["audio"], signal)
            samples += len(signal)
    return samples / RATE


def speak(text: str, voice: str) -> np.ndarray:
    """Return 16-bit samples at `RATE`, [time]."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "spoken.wav")
        command = ["espeak-ng", "-v", voice, "-w", str(path), "--stdin"]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if done.returncode or not path.is_file():
            raise InputError(f"--voices: espeak-ng cannot speak with {voice!r}: {done.stderr.strip()}")
        with wave.open(str(path)) as file:
            if (file.getnchannels(), file.getsampwidth()) != (1, 2):
                raise RunError(f"espeak-ng has written {file.getparams()}, not 16-bit mono")
            samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
            return resample(samples, file.getframerate())


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Bring samples from `rate` to `RATE`: cut or extend the spectrum; silence behind them keeps the ends apart."""
    padded = np.concatenate([samples, np.zeros(-len(samples) % rate + rate)])  # whole seconds: both lengths are exact
    length = len(padded) * RATE // rate
    resampled = np.fft.irfft(np.fft.rfft(padded), n=length) * (length / len(padded))
    return np.clip(np.rint(resampled[: len(samples) * RATE // rate]), -32768, 32767).astype("<i2")


def write_wav(path: Path, samples: np.ndarray) -> None:
    """Write 16-bit mono."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

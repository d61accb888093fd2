"""Run a recipe with several seeds and print the mean of every arm, as Markdown.

    python scripts/benchmarks/arms_over_seeds.py recipes/quickstart/recipe.yaml --seeds 0 1 2
    python scripts/benchmarks/arms_over_seeds.py recipes/quickstart/recipe.yaml --seeds 0 1 2 --out runs/all-labels \
        data.labelled=null

Each run is an ordinary `distill evaluate`, with another teacher and other labels where the seed decides them;
`evaluation.seeds` repeats what comes after one teacher. Finished runs are skipped, so the command can be given again.
Times are those of this command, next to nothing for what was finished before.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    """Run every seed, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE")
    options = parser.parse_intermixed_args()  # overrides may follow the options
    tables, seconds, spent = [], [], []
    for seed in options.seeds:
        folder = options.out / f"seed-{seed}"
        start, before = time.monotonic(), processor_time()
        command = [sys.executable, "-m", "distill", "evaluate", options.recipe, f"seed={seed}", *options.overrides]
        subprocess.run([*command, "--out", str(folder)], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.monotonic() - start)
        spent.append(processor_time() - before)
        tables.append(json.loads((folder / "evaluation.json").read_text()))
    print_table(options.seeds, tables)
    print_means(tables)
    for name, values in (("seconds", seconds), ("seconds of processor time", spent)):
        print(f"\n{name} per seed: {', '.join(f'{value:.0f}' for value in values)}")


def processor_time() -> float:
    """Add up the processor time of the runs so far, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def known(value: float | None) -> float:
    """Return nan for a figure that an arm does not have, as a majority has no correlation."""
    return float("nan") if value is None else value


def mean(values: list[float | None]) -> float:
    """Compute the mean; nan where one of them is missing."""
    return statistics.mean(map(known, values))


def print_table(seeds: list[int], tables: list[dict]) -> None:
    """One row per arm, one column per seed, and the gap that distillation has to show."""
    metric = tables[0]["primary"]
    print(f"| {metric} | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | of the teacher |")
    print("|---" * (len(seeds) + 3) + "|")
    means = {}
    for index, arm in enumerate(tables[0]["arms"]):
        values = [table["arms"][index]["metrics"][metric] for table in tables]
        means[arm["name"]] = mean(values)
        share = means[arm["name"]] / means.get("teacher", float("nan"))
        cells = " | ".join(f"{value:.4f}" for value in map(known, values))
        print(f"| {arm['name']} | {cells} | {means[arm['name']]:.4f} | {100 * share:.1f} % |")
    if {"distilled", "labels_only"} <= means.keys():
        gaps = [
            table["arms"][names.index("distilled")]["metrics"][metric]
            - table["arms"][names.index("labels_only")]["metrics"][metric]
            for table in tables
            for names in [[arm["name"] for arm in table["arms"]]]
        ]
        print(f"\ndistilled - labels_only: {', '.join(f'{gap:+.4f}' for gap in gaps)}; "
              f"mean {statistics.mean(gaps):+.4f} over {len(gaps)} seeds, "
              f"{tables[0]['data']['examples']} held-out examples each")  # fmt: skip


def print_means(tables: list[dict]) -> None:
    """Print the mean of every metric over the seeds, one row per arm."""
    metrics = tables[0]["metrics"]
    print(f"\n| mean of {len(tables)} | {' | '.join(metrics)} |")
    print("|---" * (len(metrics) + 1) + "|")
    for arms in zip(*(table["arms"] for table in tables), strict=True):
        means = [mean([arm["metrics"][metric] for arm in arms]) for metric in metrics]
        print(f"| {arms[0]['name']} | {' | '.join(f'{value:.4f}' for value in means)} |")


if __name__ == "__main__":
    main()

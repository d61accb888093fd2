"""Cut a student by every pair of layer policy and MLP score, distil each alike, and print a Markdown table.

    python scripts/benchmarks/student_policies.py recipes/stdlib-lm/recipe.yaml \
        --layers random even block_influence angular loss_drop greedy_loss \
        --scores random magnitude activation taylor_kl output_change
    python scripts/benchmarks/student_policies.py recipes/quickstart/recipe.yaml --layers random every \
        --scores random activation --steps 100 training.lr=3e-4

Each cell is an ordinary `distill evaluate` in a run folder of its own. The teacher is fitted once, and calibrated once
for each layer policy that needs more than a forward pass: cells start as copies of a prepared run folder. Finished
cells are skipped, so the command can be given again. Keep `random` among both: it is the control for all others.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

LEFT_OUT = shutil.ignore_patterns("fit", "checkpoints", "distilled", "student", "controls", "*.jsonl", ".lock")
"""Files that a cell makes for itself, or does not need."""


def main() -> None:
    """Prepare, run every cell, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--layers", nargs="+", default=["random", "even", "block_influence", "angular", "loss_drop"])
    parser.add_argument("--scores", nargs="+", default=["random", "magnitude", "activation", "taylor_kl"])
    parser.add_argument("--steps", type=int, help="optimizer steps of every cell (default: as the recipe says)")
    parser.add_argument("--out", type=Path, default=Path("runs/policies"))
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE")
    options = parser.parse_intermixed_args()  # overrides may follow the options
    collected = [f"student.calibration.{key}=true" for key in ("gradients", "gram")]
    settings = [*collected, "evaluation.efficiency=false", "evaluation.arms=[teacher, cut, distilled]"]
    if options.steps is not None:
        settings += ["training.epochs=null", f"training.steps={options.steps}"]
    settings += options.overrides
    tables, start = {}, time.monotonic()
    prepared = distill("plan", options.recipe, options.out / "prepared", None, settings)
    for policy in options.layers:
        own = [*settings, f"student.layers.choose={policy}"]
        calibrated = distill("plan", options.recipe, options.out / policy, prepared, own)
        for score in options.scores:
            folder = options.out / f"{policy}-{score}"
            distill("evaluate", options.recipe, folder, calibrated, [*own, f"student.mlp.score={score}"])
            tables[policy, score] = json.loads((folder / "evaluation.json").read_text())
    print_table(options.layers, options.scores, tables)
    print(f"\n{len(tables)} cells in {time.monotonic() - start:.0f} s")


def distill(verb: str, recipe: str, folder: Path, prepared: Path | None, settings: list[str]) -> Path:
    """Run one verb in a folder, which starts as a copy of a prepared one."""
    if prepared is not None and not folder.exists():
        shutil.copytree(prepared, folder, ignore=LEFT_OUT)
    command = [sys.executable, "-m", "distill", verb, recipe, *settings, "--out", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def print_table(policies: list[str], scores: list[str], tables: dict[tuple[str, str], dict]) -> None:
    """One row per layer policy, one column per score, `as cut / distilled` in each cell."""
    table = next(iter(tables.values()))
    metric, teacher = table["primary"], arm(table, "teacher")
    better = "higher" if table["higher_is_better"][metric] else "lower"
    print(f"{metric} as cut / distilled, {better} is better; teacher {teacher:.4g}\n")
    print(f"| layers | {' | '.join(scores)} |")
    print("|---" * (len(scores) + 1) + "|")
    for policy in policies:
        cells = [tables[policy, score] for score in scores]
        shown = [f"{arm(cell, 'cut'):.4g} / {arm(cell, 'distilled'):.4g}" for cell in cells]
        print(f"| {policy} | {' | '.join(shown)} |")


def arm(table: dict, name: str) -> float:
    """The headline metric of one arm."""
    return next(own["metrics"][table["primary"]] for own in table["arms"] if own["name"] == name)


if __name__ == "__main__":
    main()

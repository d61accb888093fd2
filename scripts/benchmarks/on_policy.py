"""Train a student on answers of the data, on its own, and on both, at equal tokens, and print a Markdown table.

    python scripts/benchmarks/on_policy.py recipes/smollm2-chat/recipe.yaml --max-new-tokens 48 training.steps=10
    python scripts/benchmarks/on_policy.py recipes/cmudict-seq2seq/recipe.yaml --shares 0 1 --max-new-tokens 30

Each row is an ordinary `distill evaluate` with another `training.on_policy.share` (0: none) in one run folder, whose
cut is made once; a finished row is kept in a file and not run again. The recipe must be of a task with prompts. KL is
that of the predictions for each token of an answer: of the answers in the test split, as `evaluation.json` has it, and
of those that each student writes itself to the same prompts, drawn at temperature 1 from one seed, which is what
learning from its own answers makes smaller. Seconds are of the training by this machine's clock, writing included.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from distill.data import evaluation_batches
from distill.losses import Objective
from distill.models.forward import forward, with_decoder_inputs
from distill.models.generate import Writing
from distill.models.precision import autocast_for
from distill.pipeline import RunDir, Session
from distill.pipeline.on_policy import writing_for
from distill.recipe import load_recipe
from distill.recipe.on_policy import OnPolicy
from distill.recipe.schema import Term
from distill.training.on_policy import unlabelled

TERMS = [Term(match="logits", loss="forward_kl"), Term(match="logits", loss="reverse_kl")]
COLUMNS = (
    *("share", "tokens", "written", "ended", "KL", "agreement", "own: KL", "own: reverse KL", "own: tokens"),
    *("seconds", "of these writing"),
)


def main() -> None:
    """Run every share, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.0, 0.5, 1.0])
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/on-policy"))
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE")
    options = parser.parse_intermixed_args()  # overrides may follow the options
    fixed = ["evaluation.efficiency=false", "evaluation.arms=[teacher, cut, distilled]", "training.log_every=1"]
    rows = []
    for share in options.shares:
        own = OnPolicy(share=share, max_new_tokens=options.max_new_tokens).model_dump() if share else None
        settings = [*fixed, *options.overrides, f"training.on_policy={json.dumps(own)}"]
        file = options.out / f"share-{share:g}.json"
        if not file.exists():
            row = train(options.recipe, settings, options.out / "run")
            file.write_text(json.dumps({"share": share, **row, **on_own_answers(options, settings)}))
        rows.append(json.loads(file.read_text()))
    print("|", " | ".join(COLUMNS), "|\n|" + "---:|" * len(COLUMNS))
    for row in rows:
        print("|", " | ".join(cell_of(row.get(name)) for name in COLUMNS), "|")


def cell_of(value: float | None) -> str:
    """Write whole numbers whole, others with four digits."""
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def train(recipe: str, settings: list[str], folder: Path) -> dict:
    """Train and evaluate in a run folder; returns the figures of the training and of the test split."""
    command = [sys.executable, "-m", "distill", "evaluate", recipe, *settings, "--out", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [line for line in lines if line["event"] == "train"]
    own = [record["on_policy"] for record in records if "on_policy" in record]
    answers, written = sum(each["answers"] for each in own), sum(each["tokens"] for each in own)
    ended = sum((each["ended_share"] or 0) * each["answers"] for each in own)
    stamp = json.loads((folder / "stages/train.json").read_text())
    arms = {arm["name"]: arm["metrics"] for arm in json.loads((folder / "evaluation.json").read_text())["arms"]}
    return {
        "tokens": records[-1]["tokens"], "written": written, "ended": ended / answers if answers else None,
        "KL": arms["distilled"]["kl"], "agreement": arms["distilled"]["agreement"], "seconds": stamp["seconds"],
        "of these writing": sum(each["seconds"] for each in own),
    }  # fmt: skip


def on_own_answers(options: argparse.Namespace, settings: list[str]) -> dict:
    """Let the student of the run folder answer the prompts of the test split, and compare it with the teacher there."""
    recipe, base = load_recipe(Path(options.recipe), settings), Path(options.recipe).parent
    session = Session(recipe, base, RunDir(options.out / "run"), print)
    corpus, task = session.corpus, session.bound_task
    objective = Objective(TERMS, corpus.head, vocabulary=session.vocabulary)
    student, teacher = session.load(session.folder.distilled).eval(), session.live_teacher(objective.teacher)
    writing: Writing = writing_for(session, OnPolicy(max_new_tokens=options.max_new_tokens), student)
    sums, counts = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    torch.manual_seed(0)
    for batch in evaluation_batches(corpus, corpus.test, recipe.evaluation.batch_size):
        with torch.no_grad(), autocast_for(student, recipe.training.precision):
            prompts = [prompt for prompt in task.prompts(batch) if prompt is not None]
            written = task.with_answers(prompts, writing(student, prompts), padding=corpus.padding, sizes=())
            own = unlabelled(with_decoder_inputs(student, written))
            found = objective(forward(student, own, objective.student), teacher(own), own, torch.ones(2))
        sums += found[1]
        counts += objective.counts([own])
    kl, reverse = (sums / counts).tolist()
    return {"own: KL": kl, "own: reverse KL": reverse, "own: tokens": int(counts[0])}


if __name__ == "__main__":
    start = time.monotonic()
    main()
    print(f"\n{time.monotonic() - start:.0f} s")

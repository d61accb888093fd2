"""Train the student of an embedding recipe as sentence-transformers does it, and measure it beside the recipe's run.

    pip install -c constraints.txt -e '.[test]'
    distill run recipes/embedding-minilm/recipe.yaml
    python scripts/benchmarks/embedding_rival.py recipes/embedding-minilm/recipe.yaml --run runs/embedding-minilm
    python scripts/benchmarks/embedding_rival.py recipes/embedding-minilm/recipe.yaml --loss cosine --lr 3e-4

Its layer reduction keeps the same layers of the same teacher; its trainer learns the teacher's vectors of the same
texts, by MSELoss, with its own defaults and the rate of its example (1e-4), or by EmbedDistillLoss (cosine), in the
same precision, for as many steps of as many texts. A row of the recipe is two texts, so a batch is twice that of the
recipe. Held-out pairs are encoded by `SentenceTransformer.encode` and measured by the metrics of distill. Nothing is
downloaded.
"""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from distill.data.rows import read_split
from distill.data.splits import Split, divide
from distill.data.tasks import TASKS
from distill.evaluation.metrics import METRICS
from distill.models.load import teacher_path
from distill.recipe import load_recipe
from distill.recipe.schema import Recipe

SIDES = ("text", "pair")
NAMES = ("mrr_at_10", "ndcg_at_10", "recall_at_10", "cosine_to_teacher", "neighbours_kept")


def main() -> None:
    """Read the recipe's texts, train the rival, and print its figures and those of the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE")
    parser.add_argument("--run", type=Path, help="run folder of the recipe, whose figures are printed as well")
    parser.add_argument("--loss", choices=("mse", "cosine"), default="mse")
    parser.add_argument("--lr", type=float, default=1e-4)
    options = parser.parse_args()
    recipe, base = load_recipe(options.recipe, options.overrides), options.recipe.absolute().parent
    with tempfile.TemporaryDirectory() as scratch:
        splits = read_texts(recipe, base, Path(scratch))
        figures = measure_rival(recipe, base, splits, options.loss, options.lr, scratch)
    if options.run:
        for arm in json.loads((options.run / "evaluation.json").read_text())["arms"]:
            figures[f"distill: {arm['name']}"] = arm["metrics"]
    width = max(map(len, figures))
    print(f"{'':{width}}  {'  '.join(NAMES)}")
    for name, own in figures.items():
        print(f"{name:{width}}  {'  '.join(f'{own[key]:{len(key)}.4f}' for key in NAMES)}")


def read_texts(recipe: Recipe, base: Path, folder: Path) -> dict[str, dict[str, list[str]]]:
    """Read the rows of both splits, as the run does."""
    task = TASKS[recipe.data.task]()
    given = [split for split in ("train", "test") if recipe.data.origins(split)]
    rows = {split: read_split(split, task, recipe.data, recipe.seed, base, folder) for split in given}

    def texts(split: Split) -> dict[str, list[str]]:
        found = split.rows.table[split.index.tolist()]
        return {side: list(found[side]) for side in SIDES}

    return {name: texts(split) for name, split in divide(rows, recipe.data, False, False).items()}


def measure_rival(
    recipe: Recipe, base: Path, splits: dict[str, dict[str, list[str]]], loss: str, lr: float, scratch: str
) -> dict[str, dict[str, float]]:
    """Cut, train and measure with sentence-transformers; returns figures of its teacher, cut and trained student."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss, MSELoss

    torch.manual_seed(recipe.seed)
    teacher = SentenceTransformer(str(teacher_path(recipe.teacher, base)), device="cpu", local_files_only=True)
    teacher.max_seq_length = recipe.data.max_length
    student = copy.deepcopy(teacher)
    reduce_layers(student, recipe)
    held_out = {side: teacher.encode(splits["test"][side]) for side in SIDES}
    figures = {"sentence-transformers: teacher": measure(teacher, splits["test"], held_out)}
    figures["sentence-transformers: cut"] = measure(student, splits["test"], held_out)
    texts = [text for side in SIDES for text in splits["train"][side]]
    data = Dataset.from_dict({"sentence": texts, "label": teacher.encode(texts).tolist()})
    arguments = Arguments(
        scratch,
        max_steps=recipe.training.steps,
        per_device_train_batch_size=len(SIDES) * recipe.training.batch_size,
        learning_rate=lr,
        warmup_steps=0.1,
        seed=recipe.seed,
        use_cpu=True,
        bf16=recipe.training.precision == "bf16",
        report_to="none",
        save_strategy="no",
        logging_steps=25,
    )
    objective = MSELoss(student) if loss == "mse" else EmbedDistillLoss(student, distance_metric=loss)
    start = time.monotonic()
    SentenceTransformerTrainer(student, arguments, train_dataset=data, loss=objective).train()
    print(f"{recipe.training.steps} steps of {arguments.per_device_train_batch_size} texts in", end=" ")
    print(f"{time.monotonic() - start:.0f} s, teacher's vectors not counted")
    figures[f"sentence-transformers: {loss}, lr {lr:g}"] = measure(student, splits["test"], held_out)
    return figures


def reduce_layers(student: object, recipe: Recipe) -> None:
    """Keep the layers of the recipe, as its example of layer reduction does it."""
    keep = recipe.student.layers.keep
    if not isinstance(keep, list):
        raise SystemExit("give the layers by number: student.layers.keep=[0, 4, 5]")
    model = student[0].auto_model  # type: ignore[index]
    model.encoder.layer = torch.nn.ModuleList(model.encoder.layer[layer] for layer in keep)
    model.config.num_hidden_layers = len(keep)


def measure(model: object, texts: dict[str, list[str]], teacher: dict[str, np.ndarray]) -> dict[str, float]:
    """Compute every metric of the recipe from vectors of the held-out pairs."""
    own = {side: model.encode(texts[side]) for side in SIDES}  # type: ignore[attr-defined]
    found = {name: METRICS[name](own["text"], own["pair"]) for name in NAMES[:3]}
    cosines = [
        (own[side] * teacher[side]).sum(1) / np.linalg.norm(own[side], axis=1) / np.linalg.norm(teacher[side], axis=1)
        for side in SIDES
    ]
    found["cosine_to_teacher"] = float(np.mean(cosines))
    return found | {"neighbours_kept": METRICS["neighbours_kept"](own["text"], teacher["text"])}


if __name__ == "__main__":
    main()

"""Run lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on models that are loaded already.

It gives what its own command line gives for the released folder: weights as they are stored, without autocast.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.recipe.sections import Harness

FIX = "pip install 'distill[harness]'"


def load_tasks(spec: Harness, folder: Path | None) -> tuple[Any, list[str]]:
    """Return its index of tasks, those of the folder included, and the names that are asked for, or all of the folder.

    Raises:
        InputError: The package is missing, or there is no such task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f"evaluation.harness needs the package lm_eval: {FIX}")
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise InputError(f"evaluation.harness.folder: {folder} is no folder")
    include = None if folder is None else str(folder)
    manager = TaskManager(include_path=include, include_defaults=bool(spec.tasks))
    names = list(spec.tasks) or sorted(manager.all_tasks)
    if missing := [name for name in names if not manager.match_tasks([name])]:
        raise InputError(f"evaluation.harness: lm_eval knows no task {', '.join(missing)}")
    if not names:
        raise InputError(f"evaluation.harness.folder: no .yaml file in {folder} is a task")
    return manager, names


def run_harness(model: Any, tokenizer: Any, spec: Harness, folder: Path | None) -> list[dict[str, Any]]:
    """Run the tasks on a model in eval mode.

    Returns:
        JSON-able `task`, `metric`, `value`, `stderr` (None where it gives none) and `examples`, one for each figure.
    """
    manager, names = load_tasks(spec, folder)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=spec.batch_size)
    settings = {"num_fewshot": spec.num_fewshot, "limit": spec.limit, "log_samples": False}
    found = simple_evaluate(model=wrapped, tasks=names, task_manager=manager, **settings)
    return [
        {
            "task": task,
            "metric": key.removesuffix(",none"),
            "value": float(value),
            "stderr": _number(figures.get(f"{key.partition(',')[0]}_stderr,{key.partition(',')[2]}")),
            "examples": found["n-samples"].get(task, {}).get("effective"),
        }
        for task, figures in found["results"].items()
        for key, value in figures.items()
        if "," in key and "_stderr," not in key and _number(value) is not None
    ]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

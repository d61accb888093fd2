"""Run lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on models that are loaded already.

It gives what its own command line gives for the released folder: weights as they are stored, without autocast.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
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
        JSON-able `task`, `metric`, `value`, `stderr` and `examples`, one for each figure, from `list_figures`.
    """
    manager, names = load_tasks(spec, folder)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=spec.batch_size)
    settings = {"num_fewshot": spec.num_fewshot, "limit": spec.limit, "log_samples": False}
    found = simple_evaluate(model=wrapped, tasks=names, task_manager=manager, **settings)
    return list_figures(found["results"], found["n-samples"])


def list_figures(results: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the figures of its results; None stands for what is not finite, or not a number."""
    found = []
    for task, figures in results.items():
        for key, value in figures.items():
            metric, comma, way = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                own = {"task": task, "metric": key.removesuffix(",none"), "value": _finite(value)}
                error = _finite(figures.get(f"{metric}_stderr,{way}"))
                found.append({**own, "stderr": error, "examples": samples.get(task, {}).get("effective")})
    return found


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

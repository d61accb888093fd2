"""Names of strategies in a recipe, checked against the tables in the source of the modules that hold them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distill.recipe.checks import View
from distill.recipe.document import Finding, KeyPath, at
from distill.recipe.locate import is_path
from distill.recipe.schema import Fit, Layers, Mask, Mlp, Training
from distill.registry import is_reference, names_in, nearest

KEYS = {"protected": "protect_first"}
"""Reserved parameter -> the key that it follows from, where the two differ."""


@dataclass(frozen=True)
class Choice:
    """A name that a recipe gives, the table it must be in, and where its parameters stand."""

    path: KeyPath
    name: Any
    what: str
    module: str
    table: str
    params: KeyPath | None = None
    reserved: tuple[str, ...] = ()
    """Parameters of the function that are keys of their own in the recipe."""


def names_are_known(view: View) -> Iterator[Finding]:
    """Every strategy exists and takes the parameters that it is given."""
    for choice in _choices(view):
        if not isinstance(choice.name, str) or is_reference(choice.name):
            continue
        rows = names_in(choice.module, choice.table)
        if choice.name not in rows:
            close = nearest(choice.name, rows)
            hint = f"did you mean {close!r}? " if close else ""
            fix = f"{hint}The options are {', '.join(rows)}"
            yield Finding(choice.path, f"unknown {choice.what} {choice.name!r}", fix)
        elif choice.params is not None:
            yield from _unknown_params(choice, choice.params, rows[choice.name], at(view.data, choice.params))


def _unknown_params(choice: Choice, path: KeyPath, accepted: list[str] | None, params: Any) -> Iterator[Finding]:
    if accepted is None or not isinstance(params, dict):
        return
    own = [name for name in accepted if name not in choice.reserved]
    for name in params:
        if name in choice.reserved:
            fix = f"write `{KEYS.get(name, name)}:` beside `params:`"
            yield Finding((*path, name), f"{name} is a key of its own, not a parameter", fix, at="key")
        elif name not in own:
            close = nearest(name, own)
            hint = f"did you mean {close!r}? " if close else ""
            fix = f"{hint}It has {', '.join(own)}" if own else "remove it; it has none"
            yield Finding((*path, name), f"the {choice.what} {choice.name} has no such parameter", fix, at="key")


def _choices(view: View) -> Iterator[Choice]:
    mlp: KeyPath = ("student", "mlp")
    for key in ("layers", "encoder_layers"):
        layers: KeyPath = ("student", key)
        depth, where = view.section(layers, Layers), "distill.student.layers"
        if depth is not None and not isinstance(depth.get("keep"), list):
            path, params = (*layers, "choose"), (*layers, "params")
            yield Choice(path, depth["choose"], "layer policy", where, "CHOICES", params, reserved=("protected",))
    width = view.section(mlp, Mlp)
    if width is not None:
        score, spread = width["score"], width["allocate"]
        yield Choice((*mlp, "score"), score, "score", "distill.student.scores", "SCORES", (*mlp, "params"))
        own_params = (*mlp, "allocate_params")
        yield Choice((*mlp, "allocate"), spread, "allocation", "distill.student.allocate", "ALLOCATIONS", own_params)
    mask: KeyPath = ("student", "mask")
    zeros = view.section(mask, Mask)
    if zeros is not None:
        name = zeros["score"]
        yield Choice((*mask, "score"), name, "mask score", "distill.student.masks.masks", "SCORES", (*mask, "params"))
    yield from _losses(view)
    for own, model in ((("teacher", "fit"), Fit), (("training",), Training)):
        learning = view.section(own, model) if isinstance(at(view.data, own), dict) else None
        if learning is not None:
            name, table = learning["optimizer"], ("distill.training.optim", "OPTIMIZERS")
            params = (*own, "optimizer_params")
            yield Choice((*own, "optimizer"), name, "optimizer", *table, params, reserved=("lr", "betas"))
    source: KeyPath = ("data", "source")
    name = at(view.data, source)
    if not (isinstance(name, str) and is_path(name)):
        yield Choice(source, name, "data source", "distill.data.sources", "SOURCES")
    task: KeyPath = ("data", "task")
    yield Choice(task, at(view.data, task), "task", "distill.data.tasks", "TASKS")
    metrics: KeyPath = ("evaluation", "metrics")
    names = at(view.data, metrics)
    for position, name in enumerate(names if isinstance(names, list) else []):
        yield Choice((*metrics, position), name, "metric", "distill.evaluation.metrics", "METRICS")


TABLES = {
    "logits": ("forward_kl", "distill.losses.logits", "LOGITS"),
    "hidden": ("mse", "distill.losses.hidden", "HIDDEN"),
    "embeddings": ("mse", "distill.losses.hidden", "HIDDEN"),
    "output": ("mse", "distill.losses.hidden", "HIDDEN"),
    "attention": ("kl", "distill.losses.relation", "ATTENTION"),
    "relations": ("qkv", "distill.losses.relation", "RELATION"),
}
"""What a loss term matches -> its default loss, and the table of all."""


def _losses(view: View) -> Iterator[Choice]:
    for path, term in view.terms():
        if term.get("match") in TABLES:
            default, module, table = TABLES[str(term["match"])]
            reserved = ("temperature",) if table == "LOGITS" else ()
            own, params = (*path, "loss"), (*path, "params")
            yield Choice(own, term["loss"] or default, "loss", module, table, params, reserved)

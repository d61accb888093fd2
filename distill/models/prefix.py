"""The layers that student and teacher have in common at the start: equal and frozen, they are run once for both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from distill.models.layout import layers_of, layers_prefix

AFTER_LAYERS = ("norm", "ln_f", "final_layer_norm", "pooler", "project_out")
"""Modules of a base model that come after its layers; whatever else is outside of them may feed them."""
DROPS = ("p", "dropout", "attention_dropout", "activation_dropout")
"""Attributes of modules that hold a share of numbers that training drops at random."""


def shared_layers(student: Any, teacher: Any) -> int:
    """How many layers, from the first one on, may be run once for both.

    All that feeds the first layer, and each of these layers, must be equal in both models, must not learn, and must not
    drop anything in training.

    Args:
        student: Its parameters that do not learn have `requires_grad` False.
        teacher: In the dtype that the student is trained in.
    """
    if not _shared(_before_layers(student), _before_layers(teacher)):
        return 0
    count = 0
    for own, theirs in zip(layers_of(student), layers_of(teacher), strict=False):
        if not _shared([own], [theirs]):
            break
        count += 1
    return count


def _before_layers(model: Any) -> list[nn.Module]:
    base, layers = model.base_model, layers_prefix(model).removeprefix(f"{model.base_model_prefix}.")
    outer = base.get_submodule(layers.rpartition(".")[0])
    parts = chain(base.named_children(), outer.named_children() if outer is not base else ())
    return [part for name, part in parts if name not in (*AFTER_LAYERS, *layers.split("."))]


def _shared(own: Sequence[nn.Module], theirs: Sequence[nn.Module]) -> bool:
    modules = [module for part in own for module in part.modules()]
    if any(isinstance(value := getattr(m, name, 0), float) and value > 0 for m in modules for name in DROPS):
        return False
    sides = [[*part.named_parameters(), *part.named_buffers()] for part in (nn.ModuleList(own), nn.ModuleList(theirs))]
    if [name for name, _ in sides[0]] != [name for name, _ in sides[1]]:
        return False
    pairs = [(a, b) for (_, a), (_, b) in zip(*sides, strict=True)]
    return not any(a.requires_grad for a, _ in pairs) and all(torch.equal(a.to(b), b) for a, b in pairs)


@contextmanager
def replayed(model: Any, outputs: Sequence[Any]) -> Iterator[None]:
    """During the block the first layers are not run: each returns what another model's layer did."""
    layers = layers_of(model)[: len(outputs)]
    before = [vars(layer).get("forward") for layer in layers]  # e.g. a compiled one
    for layer, output in zip(layers, outputs, strict=True):
        layer.forward = lambda *_args, _output=output, **_named: _output
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward

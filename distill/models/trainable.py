"""Set the trainable parameters of a model by shell patterns over their names, and note which must learn."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from torch import nn

from distill.errors import InputError


def freeze(model: nn.Module, patterns: Sequence[str], only: Sequence[str] = ("*",)) -> None:
    """Make trainable exactly the parameters whose name matches one of `only` and none of `patterns`.

    Raises:
        InputError: A pattern matches no parameter, or nothing is left to learn.
    """
    names = [name for name, _ in model.named_parameters()]
    for key, own in (("freeze", patterns), ("only", only)):
        for pattern in own:
            if not fnmatch.filter(names, pattern):
                raise InputError(f"{key}: {pattern!r} matches no parameter; there are e.g. {', '.join(names[:3])}")
    for name, parameter in model.named_parameters():
        learns, frozen = (any(fnmatch.fnmatchcase(name, pattern) for pattern in own) for own in (only, patterns))
        parameter.requires_grad_(learns and not frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        kept = "" if list(only) == ["*"] else f" with only: {list(only)}"
        raise InputError(f"freeze: {list(patterns)}{kept} leaves no parameter that learns")


def mark_drawn(model: nn.Module, names: Iterable[str]) -> None:
    """Note parameters that were drawn at random and mean nothing until they have learnt."""
    model.drawn = sorted({*drawn_parameters(model), *names})  # type: ignore[assignment]


def drawn_parameters(model: nn.Module) -> list[str]:
    """Name the parameters that `mark_drawn` noted."""
    return list(getattr(model, "drawn", ()))

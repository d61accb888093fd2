"""Judge what transformers reports after loading: weights that were missing, did not fit, or were left over."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from distill.errors import InputError
from distill.models.trainable import mark_drawn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHOWN = 3
"""Names in a message; of the others there is the number."""


def check_loaded(
    folder: Path, model: Any, info: dict[str, Any], allow_untrained_head: bool, pooled: bool, say: Callable[[str], None]
) -> None:
    """Refuse a model of which anything was drawn at random but a head that is about to be fitted.

    Args:
        folder: Where the weights came from.
        model: As loaded, with its task's head.
        info: The report of `from_pretrained`.
        allow_untrained_head: Accept a new head, and a new pooler where the folder has none.
        pooled: The model makes vectors, of which a pooler of its own is no part.
        say: Gets a line about new and about unused tensors.

    Raises:
        InputError: With the numbers and names on both sides.
    """
    unused = sorted(info["unexpected_keys"])
    shapes = {name: (tuple(stored), tuple(wanted)) for name, stored, wanted in info["mismatched_keys"]}
    missing = set(info["missing_keys"]) - set(shapes)
    if pooled and (spare := {name for name in missing if name.startswith("pooler.")}):
        missing -= spare
        say(f"  drawn at random, and no part of a vector: {_listed(spare)}")
    head = _head_tensors(model, missing)
    if reasons := _reasons(model, missing - head, {name: shapes[name] for name in shapes.keys() - head}, unused):
        raise InputError(f"{folder} does not hold the weights of a {type(model).__name__}: {'; '.join(reasons)}")
    new = sorted(missing | shapes.keys())
    if new and not allow_untrained_head:
        raise InputError(
            f"{folder} has no trained weights for {_listed(new)}: "
            f"add `fit: {{epochs: …, lr: …}}` under `teacher:` to train them on the recipe's labels first"
        )
    if broken := [name for name, own in model.named_parameters() if own.dtype in FLOATS and not own.isfinite().all()]:
        raise InputError(f"{folder} holds numbers that are not finite, in {_listed(broken)}: it was not saved whole")
    if new:
        mark_drawn(model, new)
        say(f"  drawn at random, to be fitted: {_listed(new)}")
    if unused:
        say(f"  in {folder} and not part of a {type(model).__name__}: {_listed(unused)}")


def _reasons(
    model: Any, missing: Collection[str], shapes: dict[str, tuple[Any, Any]], unused: Collection[str]
) -> list[str]:
    """Say what is wrong with the weights that must be there, and how it may be put right; nothing when all are."""
    total = len(model.state_dict())
    reasons = []
    if missing:
        left = f"and has {len(unused)} that such a model has not ({_listed(unused)})" if unused else "and has no other"
        reasons.append(f"it lacks {len(missing)} of {total} tensors ({_listed(missing)}) {left}")
        if prefix := _common_prefix(missing, unused):
            reasons.append(f"take the prefix {prefix!r} off the names in the file")
    output = model.get_output_embeddings()
    tied = f"{next((name for name, module in model.named_modules() if module is output), None)}.weight"
    if output is not None and tied in missing:
        reasons.append(f"if {tied} is the matrix of the embeddings, config.json must say tie_word_embeddings: true")
    if shapes:
        name = min(shapes)
        reasons.append(
            f"config.json asks for other shapes than the file has for {_listed(shapes)}: {name} is "
            f"{list(shapes[name][0])} in the file, {list(shapes[name][1])} by config.json"
        )
    return reasons


def _head_tensors(model: Any, missing: Collection[str]) -> set[str]:
    """Name the tensors that may be new: a head of classes, and a pooler of which the folder has nothing.

    A head over the vocabulary is part of what a language model has learnt and never new.
    """
    base = model.base_model
    if base is model or model.get_output_embeddings() is not None:
        return set()
    names = set(model.state_dict())
    pooler = {name for name in names if name.startswith(f"{model.base_model_prefix}.pooler.")}
    head = {name for name in names if not name.startswith(f"{model.base_model_prefix}.")}
    return head | (pooler if pooler <= set(missing) else set())


def _common_prefix(missing: Collection[str], unused: Collection[str]) -> str:
    """Find what stands in front of every unused name that, without it, is one of the missing; empty: nothing does."""
    found = {name[: -len(wanted)] for name in unused for wanted in missing if name.endswith(f".{wanted}")}
    return min(found, key=len) if len(found) == 1 else ""


def untie_config(model: Any, say: Callable[[str], None]) -> None:
    """Set `tie_word_embeddings` to what the tensors are, so that the config makes the same model again.

    transformers does not tie a head to the embeddings where the file holds both and they differ, but leaves the flag.
    """
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
    apart = {
        target: source
        for target, source in pairs.items()
        if model.get_parameter_or_buffer(target) is not model.get_parameter_or_buffer(source)
    }
    if apart:
        model.config.tie_word_embeddings = False
        target, source = min(apart.items())
        say(f"  {target} is not {source}, as the file holds both: tie_word_embeddings is taken for false")


def _listed(names: Collection[str]) -> str:
    some = sorted(names)[:SHOWN]
    more = f" and {len(names) - len(some)} more" if len(names) > len(some) else ""
    return f"{', '.join(some)}{more}"

"""The kinds of layers by index, as configs write them down: a list with an entry per layer, indices, or a number.

transformers reads the list and other software the number, so after layers are dropped all of them must say the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

PERIOD_KEYS: dict[str, tuple[str, ...]] = {
    "layer_types": (
        *("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers"),
        *("full_attention_interval", "window_pattern", "attn_layer_period"),
    ),
    "mlp_layer_types": ("moe_layer_freq", "decoder_sparse_step", "interleave_moe_layer_step"),
    "no_rope_layers": ("no_rope_layer_interval",),
    "indexer_types": ("index_topk_freq",),
}
"""Config attributes with one entry per layer of the main stack -> numbers that families derive them from."""
PER_LAYER_LISTS = (*PERIOD_KEYS, "layer_rope_theta", "num_attention_heads_per_layer", "activation_sparsity_pattern")
"""All config attributes with one entry per layer; they are cut together with the layers."""
INDEX_LISTS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "rope_scaling_layers")
"""Config attributes that list indices of layers."""
FIRST_KEYS = ("first_k_dense_replace", "max_window_layers", "num_dense_layers")
"""Config attributes that count the first layers, which are of another kind."""
FAILURES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
"""Errors of a config class that cannot do without what was left out."""


def cut_lists(config: Any, kept: Sequence[int]) -> None:
    """Write down the kinds of these layers, ascending indices of the config's own, as those of a shorter stack."""
    depth, own = config.num_hidden_layers, vars(config)
    if list(kept) == list(range(depth)):
        return
    for name in PER_LAYER_LISTS:
        if (values := getattr(config, name, None)) is not None:
            setattr(config, name, [values[index] for index in kept])  # fails where the class computes it by itself
    for name, indices in _stated(config, INDEX_LISTS).items():
        own[name] = [place for place, index in enumerate(kept) if index in indices]
    for name in FIRST_KEYS:
        first = own.get(name)
        if type(first) is int and first <= depth:
            own[name] = sum(index < first for index in kept)


def settle_periods(config: Any) -> None:
    """Bring the numbers that lists with an entry per layer can be derived from to what the lists say.

    A number stays, or becomes another one, only where the family's own rule makes the same list of it; otherwise it
    goes. It is looked at after every loading: config classes put a missing one back with its default.
    """
    for name, keys in PERIOD_KEYS.items():
        given = {key: vars(config)[key] for key in keys if vars(config).get(key) is not None}
        kinds = vars(config).get(name)
        derived = _derive(config, [name], given) if given and isinstance(kinds, list) else None
        if derived is None or derived == {name: kinds}:
            continue
        public = {key.lstrip("_") for key in given}  # the name that config classes read, where they write another
        candidates = (dict.fromkeys({*given, *public}, period) for period in range(1, len(kinds) + 2))
        for key in given:
            del vars(config)[key]
        vars(config).update(next((each for each in candidates if _derive(config, [name], each) == {name: kinds}), {}))


def pattern_note(config: Any) -> str:
    """Say who computes another model than this config describes; empty where the family's own rule describes it too."""
    lists = _stated(config, PERIOD_KEYS)
    given = {key: vars(config)[key] for name in lists for key in PERIOD_KEYS[name] if key in vars(config)}
    if not lists or _derive(config, list(lists), {}) in (lists, None):
        return ""
    names = " and ".join(lists)
    if given and _derive(config, list(lists), given) == lists:
        numbers = " and ".join(f"{key}: {given[key]}" for key in sorted(given) if not key.startswith("_"))
        return (
            f"The kinds of its layers are in {names} of config.json, and {numbers} says the same. Software that has "
            f"the pattern of a {config.model_type} built in reads neither and computes another model."
        )
    return (
        f"The kinds of its layers are in {names} of config.json and follow no rule. Software that derives them from "
        f"the number of a layer, as for other models of type {config.model_type}, computes another model."
    )


def _stated(config: Any, names: Sequence[str] | Mapping[str, Any]) -> dict[str, list[Any]]:
    """Select the lists that a config has; those that it computes from something else are no attributes of their own."""
    return {name: list(vars(config)[name]) for name in names if isinstance(vars(config).get(name), list | tuple)}


def _derive(config: Any, names: Sequence[str], keys: Mapping[str, Any]) -> dict[str, list[Any]] | None:
    """Let the config's class derive lists from these numbers and no others; None where it cannot."""
    numbers = {key for name in names for key in PERIOD_KEYS[name]}
    rest = {name: value for name, value in config.to_dict().items() if name not in {*names, *numbers}}
    try:
        derived = type(config).from_dict(copy.deepcopy({**rest, **keys}))
    except FAILURES:
        return None
    return {name: values for name, values in _stated(derived, PER_LAYER_LISTS).items() if name in names}

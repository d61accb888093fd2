"""Sentence embeddings as sentence-transformers makes them: read from a model's folder, and written to one.

Its folders hold a transformer, and beside it what happens to the states of the last layer: `modules.json` lists the
modules, `1_Pooling/config.json` says how one vector is made of many. The files are JSON and name classes, none of which
is imported here.

B texts, L positions, D hidden width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from distill.errors import InputError
from distill.files import is_plain_name, read_json, read_object

MODULES, SETTINGS, POOLING = "modules.json", "config_sentence_transformers.json", "1_Pooling/config.json"
TRANSFORMER = "sentence_bert_config.json"
UNSUPPORTED = ("processing_kwargs", "query_expansion", "query_length", "document_length")
"""Keys of the transformer module that change what it reads."""
LEGACY = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""Way of pooling -> the switch that stands for it in folders of older versions, in the order of the vectors."""
QUERY, DOCUMENTS = "query", ("document", "passage", "corpus")
"""Names of the prompts that `encode_query` and `encode_document` look for."""


@dataclass(frozen=True)
class SentenceHead:
    """The way from the last hidden states of a text to its vector, and what is put in front of texts."""

    modes: tuple[str, ...] = ("mean",)
    """Ways of pooling, keys of `POOLS`; the vectors of several stand side by side."""
    normalize: bool = False
    """Vectors have the length 1."""
    include_prompt: bool = True
    """The tokens of a prompt are pooled as well."""
    lower: bool = False
    """Texts are put into lower case first."""
    max_length: int | None = None
    """Tokens to which texts are cut; None: the tokenizer says it."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Name -> text that stands in front of texts."""
    default_prompt: str | None = None
    """Name of the prompt that `encode` uses."""
    similarity: str | None = None

    def __call__(self, states: Tensor, mask: Tensor) -> Tensor:
        """Pool the last hidden states [B, L, D] over the positions of a mask [B, L], in fp32 or wider: [B, D]."""
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        vectors = torch.cat([POOLS[mode](wide, mask.bool()) for mode in self.modes], dim=-1)
        return functional.normalize(vectors, dim=-1) if self.normalize else vectors

    def prompt(self, side: str, retrieval: bool) -> str:
        """Return what stands in front of the texts of a column, `text` or `pair`.

        Args:
            side: The column.
            retrieval: `pair` is the document that `text` asks for; else both sides are alike.
        """
        names = ((QUERY,) if side == "text" else DOCUMENTS) if retrieval else ()
        wanted = (*names, self.default_prompt or "")
        return next((self.prompts[name] for name in wanted if name in self.prompts), "")

    def with_prompts(self, prompts: Mapping[str, str], retrieval: bool) -> SentenceHead:
        """Return the head with other prompts for `text` and `pair`, as a recipe gives them.

        Raises InputError where the teacher pools without its prompts.
        """
        if not prompts:
            return self
        if not self.include_prompt and any(prompts.values()):
            raise InputError("data.prompts: the teacher does not pool prompts (include_prompt: false); remove them")
        if not retrieval:
            return replace(self, prompts={**self.prompts, "text": prompts["text"]}, default_prompt="text")
        names = {"text": QUERY, "pair": DOCUMENTS[0]}
        given = {name: prompts[side] for side, name in names.items() if side in prompts}
        others = {name: text for name, text in self.prompts.items() if name not in DOCUMENTS or "pair" not in prompts}
        return replace(self, prompts={**others, **given})

    def files(self, width: int) -> dict[str, str]:
        """Write the files beside a transformer of this hidden width, by name: any sentence-transformers loads them."""
        kinds = ["Transformer", "Pooling", *(["Normalize"] if self.normalize else [])]
        paths = ["", *(f"{index}_{kind}" for index, kind in enumerate(kinds) if index)]
        modules = [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (kind, path) in enumerate(zip(kinds, paths, strict=True))
        ]
        pooling = {switch: mode in self.modes for mode, switch in LEGACY.items()}
        length = {} if self.max_length is None else {"max_seq_length": self.max_length}
        settings = {"prompts": dict(self.prompts), "default_prompt_name": self.default_prompt}
        contents: dict[str, Any] = {
            MODULES: modules,
            POOLING: {"word_embedding_dimension": width, **pooling, "include_prompt": self.include_prompt},
            TRANSFORMER: {**length, "do_lower_case": self.lower},
            SETTINGS: {"model_type": "SentenceTransformer", **settings, "similarity_fn_name": self.similarity},
        }
        return {name: json.dumps(content, indent=2) + "\n" for name, content in contents.items()}


def sentence_head(folder: Path, say: Callable[[str], None] = lambda _line: None) -> SentenceHead:
    """Read the sentence head of a folder; without `modules.json`, the mean, as sentence-transformers takes it.

    Raises:
        InputError: A file is broken, or asks for something that cannot be kept.
    """
    if not (folder / MODULES).is_file():
        if (folder.parent / MODULES).is_file():
            raise InputError(
                f"{folder} is a module of {folder.parent}, whose pooling would be lost: move its files up there, write "
                f'"path": "" for it in {MODULES}, and name that folder'
            )
        say(f"  {folder} has no {MODULES}: a text's vector is the mean of its last hidden states")
        return SentenceHead()
    kinds = list(_modules(folder / MODULES))
    path = next((path for kind, path in kinds if kind == "Pooling"), "")
    pooling = read_object(folder / path / "config.json")
    module = next((read_object(file) for file in sorted(folder.glob("sentence_*_config.json"))), {})
    settings = read_object(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    if odd := [key for key in UNSUPPORTED if module.get(key)]:
        raise InputError(f"{folder / TRANSFORMER}: {odd[0]} cannot be kept; remove it from a copy of the folder")
    head = SentenceHead(
        modes=_modes(pooling, folder / path),
        normalize=any(kind == "Normalize" for kind, _ in kinds),
        include_prompt=pooling.get("include_prompt", True) is not False,
        lower=module.get("do_lower_case", False) is True,
        max_length=module.get("max_seq_length"),
        prompts=settings.get("prompts") or {},
        default_prompt=settings.get("default_prompt_name"),
        similarity=settings.get("similarity_fn_name"),
    )
    if type(head.max_length) not in (int, type(None)) or not _is_texts(head.prompts):
        raise InputError(f"{folder}: max_seq_length is no whole number, or a prompt is no text")
    if not head.include_prompt and any(head.prompts.values()):
        raise InputError(f"{folder / path}: prompts that are not pooled (include_prompt: false) cannot be kept")
    return head


def _is_texts(prompts: Any) -> bool:
    return isinstance(prompts, dict) and all(isinstance(text, str) for text in prompts.values())


def _modules(path: Path) -> Iterator[tuple[str, str]]:
    """Yield kind and folder of the modules; raises InputError for any that are not kept."""
    try:
        listed = [(str(each["type"]), str(each["path"])) for each in read_json(path)]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise InputError(f"{path} does not list modules: {error}") from error
    kinds = [name.rpartition(".")[2] if name.startswith("sentence_transformers.") else name for name, _ in listed]
    for kind in kinds:
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise InputError(
                f"{path}: a module {kind} after the transformer cannot be kept: a student's vectors are pooled from "
                f"its last hidden states and normalised, nothing else"
            )
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Normalize"} or listed[0][1]:
        raise InputError(f"{path}: it must list a Transformer in the folder itself, then a Pooling, then a Normalize")
    for kind, (_, folder) in zip(kinds, listed, strict=True):
        if folder and not is_plain_name(folder):
            raise InputError(f"{path}: {folder!r} is no folder beside it")
        yield kind, folder


def _modes(pooling: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    unsaid = "none" if pooling.keys() & {*LEGACY.values()} else "mean"  # all switched off, or none mentioned
    given = pooling.get("pooling_mode") or [mode for mode, switch in LEGACY.items() if pooling.get(switch)] or unsaid
    modes = (given,) if isinstance(given, str) else tuple(given)
    if odd := [mode for mode in modes if mode not in POOLS]:
        raise InputError(f"{folder}/config.json: unknown pooling {odd[0]!r}; known are {', '.join(POOLS)}")
    if list(modes) != [mode for mode in LEGACY if mode in modes]:
        raise InputError(f"{folder}/config.json: the order of {', '.join(modes)} cannot be kept")
    return modes


def sentence_files(
    model: Any, prompts: Mapping[str, str] | None = None, retrieval: bool = False, length: int | None = None
) -> dict[str, str]:
    """Write the files beside a model that makes sentence embeddings, else none.

    With the prompts of a recipe, and the tokens to which it cuts texts, where these are given.
    """
    head = getattr(model, "sentence_head", None)
    if head is None:
        return {}
    limited: SentenceHead = replace(head, max_length=length or head.max_length)
    return limited.with_prompts(prompts or {}, retrieval).files(model.config.hidden_size)


def unused_parameters(model: Any) -> Sequence[str]:
    """Name the parameters that a model's vectors do not depend on: the pooler of its own, which never learns."""
    pooled = getattr(model, "sentence_head", None) is not None
    return [name for name, _ in model.named_parameters() if pooled and name.startswith("pooler.")]


def _sum(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(~mask[..., None], 0).sum(1)


def _count(mask: Tensor) -> Tensor:
    return mask.sum(1, keepdim=True).clamp(min=1)


def _first(states: Tensor, mask: Tensor) -> Tensor:
    return states[
        torch.arange(states.shape[0], device=states.device), mask.int().argmax(1)
    ]  # len() would be a constant of an export


def _last(states: Tensor, mask: Tensor) -> Tensor:
    return _first(states.flip(1), mask.flip(1))


def _weighted_mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.cumsum(1) * mask
    return (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)


POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": lambda states, mask: states.masked_fill(~mask[..., None], -torch.inf).amax(1),
    "mean": lambda states, mask: _sum(states, mask) / _count(mask),
    "mean_sqrt_len_tokens": lambda states, mask: _sum(states, mask) / _count(mask).sqrt(),
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
"""Way of pooling -> (states [B, L, D], mask of the real positions) -> [B, D]."""

"""Columns of a cached teacher: the outputs that a loss needs, at which positions, and the teacher that reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from distill.files import cache_folder, read_written
from distill.losses import MATCHES, PREDICTION_KINDS, Objective
from distill.losses.kinds import Mask
from distill.models.forward import Batch, Outputs
from distill.models.load import load_config
from distill.models.precision import DTYPES
from distill.models.topk import TopK
from distill.pipeline.json_shapes import Cached
from distill.pipeline.session import Session
from distill.pipeline.teachers import load_teaching
from distill.recipe.cache import TeacherCache
from distill.recipe.schema import Term
from distill.teacher import CachedTeacher, LiveTeacher, Mixture
from distill.teacher.cache import ENTRIES, Column
from distill.teacher.keys import row_keys
from distill.teacher.shards import ShardFolder

FOLDER = "teachers"
"""Of the user's cache."""


def find_teacher(
    session: Session, terms: Sequence[Term], objective: Objective
) -> LiveTeacher | CachedTeacher | Mixture | None:
    """Find the teacher of a training: live, from the cache where the recipe asks for one, or none.

    Raises:
        InputError: A part of the cache is missing or damaged.
    """
    if not objective.needs_teacher:
        return None
    if session.recipe.teacher.cache is None:
        return load_teaching(session, objective.teacher)
    columns, keys = columns_of(session, terms, objective), partial(keys_of, session.corpus.head)
    width = load_config(session.teacher, session.head, session.remote_code).hidden_size
    return CachedTeacher(folder_of(session), columns, keys, session.vocabulary or 0, width)


def folder_of(session: Session) -> ShardFolder:
    """Return the cache that the stage has filled."""
    return ShardFolder(cache_folder(FOLDER) / read_written(session.folder.cached, Cached)["cache"])


def lost_parts(session: Session) -> str:
    """Name files that are missing from a cache since the stage filled it; users may delete it at any time."""
    facts, folder = read_written(session.folder.cached, Cached), folder_of(session)
    wanted = [ENTRIES, *facts["files"]]
    have = {name for group in ("", *{name.rpartition("/")[0] for name in wanted}) for name in folder.names(group)}
    gone = [name for name in wanted if name not in have]
    return f"gone: {folder.root / gone[0]}{f' and {len(gone) - 1} more' if gone[1:] else ''}" if gone else ""


def columns_of(session: Session, terms: Sequence[Term], objective: Objective) -> list[Column]:
    """List what has to be kept for a loss: predictions, where a term compares them, and the layers that it reads."""
    spec, kind, columns = session.recipe.teacher.cache, session.corpus.head, []
    assert spec is not None, "nothing is kept without `teacher.cache`"
    taught = [MATCHES[term.match] for term in terms if MATCHES[term.match].needs_teacher]
    if any(match.capture is None for match in taught):
        columns.append(_predictions(spec, kind))
    for layer in objective.teacher.hidden:
        columns.append(Column("hidden", partial(_mask, kind, "states"), spec.dtype, layer))
    for layer in objective.teacher.encoder_hidden:
        columns.append(Column("encoder_hidden", partial(_mask, kind, "source"), spec.dtype, layer))
    return columns


def _predictions(spec: TeacherCache, kind: str) -> Column:
    if PREDICTION_KINDS[kind].vocabulary:
        where = partial(_predicted, kind)
        return Column("topk", where, k=spec.k) if spec.keep == "topk" else Column("last", where, spec.dtype)
    if kind in ("span", "token"):
        return Column("logits", PREDICTION_KINDS[kind].tokens, form="ends" if kind == "span" else "positions")
    return Column("logits", _real_rows, form="row")


def keys_of(kind: str, batch: Batch) -> np.ndarray:
    """Hash the rows of a batch for a kind of predictions, uint8 [B, KEY]; a decoder that writes reads the labels."""
    marks = [_predicted(kind, batch), _mask(kind, "states", batch)] if PREDICTION_KINDS[kind].vocabulary else []
    # Which teacher answers may depend on the route.
    return row_keys(batch, marks, ("route", "labels") if kind == "seq2seq" else ("route",))


def real_rows(batch: Batch) -> Tensor:
    """Find the rows with anything to read, boolean [B]; of sound all."""
    if "input_ids" not in batch:
        return torch.ones(len(batch["labels"]), dtype=torch.bool)
    return batch["attention_mask"].bool().any(-1)


def _predicted(kind: str, batch: Batch) -> Tensor:
    mask = PREDICTION_KINDS[kind].predicted(batch)
    return functional.pad(mask, (0, batch["labels"].shape[1] - mask.shape[1]))  # the last token predicts none


def _mask(kind: str, name: Mask, batch: Batch) -> Tensor:
    mask: Tensor = getattr(PREDICTION_KINDS[kind], name)(batch)
    return mask


def _real_rows(batch: Batch) -> Tensor:
    return batch["attention_mask"].bool().any(-1, keepdim=True)


def as_kept(outputs: Outputs, spec: TeacherCache) -> Outputs:
    """Convert a teacher's outputs to the form that a cache returns; top-k tokens are placeholders."""
    dtype = DTYPES[spec.dtype]
    states = {
        name: {layer: value.to(dtype, copy=True) for layer, value in getattr(outputs, name).items()}
        for name in ("hidden", "encoder_hidden")
    }
    if outputs.last is None:
        logits = None if outputs.logits is None else outputs.logits.clone()
        return replace(outputs, logits=logits, **states)  # type: ignore[arg-type]
    if spec.keep == "hidden":
        return replace(outputs, last=outputs.last.to(dtype, copy=True), **states)  # type: ignore[arg-type]
    shape, device = outputs.last.shape[:-1], outputs.last.device
    ids = torch.arange(spec.k, device=device).expand(*shape, -1).clone()
    likely = torch.full((*shape, spec.k + 1), -math.log(spec.k + 1), device=device)
    return replace(outputs, last=None, head=None, logits=TopK(ids, likely), **states)  # type: ignore[arg-type]

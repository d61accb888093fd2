"""The rules by which a cached teacher has all that the losses compare, and nothing that they do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from distill.recipe import names
from distill.recipe.cache import LAYERS, PREDICTIONS
from distill.recipe.data import Data
from distill.recipe.fields import KeyPath, Mistake
from distill.recipe.sections import Teacher, Training
from distill.recipe.terms import Term


def cached_outputs_are_enough(teacher: Teacher, terms: Mapping[int, Term]) -> Iterator[Mistake]:
    """Refuse terms that compare what the cache does not keep."""
    if teacher.cache is None:
        return
    for index, term in terms.items():
        path: KeyPath = ("losses", index, "match")
        if term.match in LAYERS and teacher.cache.layers == "none":
            message = f"match: {term.match} reads layers of the teacher, and teacher.cache.layers is none"
            yield Mistake(path, message, "write layers: mapped")
        elif term.match not in (*PREDICTIONS, *LAYERS, "labels"):
            message = f"match: {term.match} reads inside of the teacher's layers, which teacher.cache does not keep"
            yield Mistake(path, message, "remove the term, or teacher.cache")
        elif teacher.cache.keep == "topk":
            for mistake in term.beyond_top_k(teacher.cache.k):
                yield replace(mistake, path=("losses", index, *mistake.path))


def cache_is_read(teacher: Teacher, losses: list[Term], data: Data, training: Training) -> Iterator[Mistake]:
    """Refuse a cache, or a part of one, that no term reads, that the teacher cannot fill, or that lacks inputs."""
    if teacher.cache is None:
        return
    key: KeyPath = ("teacher", "cache")
    if teacher.device == "sharded":
        message = "the ranks fill it each at its own pace, and a sharded teacher needs all of them at once"
        yield Mistake(key, message, "write device: same or cpu: the teacher runs alone, without the student", at="key")
    if training.on_policy is not None:
        message = "what the student will write is not known, so the teacher cannot be asked about it beforehand"
        yield Mistake(key, message, "remove it, or training.on_policy", at="key")
    matches, topk = {term.match for term in losses}, teacher.cache.keep == "topk"
    if matches == {"labels"}:
        yield Mistake(key, "has no effect: no term compares with the teacher", "remove it", at="key")
    elif topk and not matches & {*PREDICTIONS}:
        message = "no term compares predictions with the teacher's"
        yield Mistake((*key, "keep"), message, "write keep: hidden, with which layers are kept alone")
    elif topk and ":" not in data.task and data.task not in names.VOCABULARY_TASKS:
        message = f"task: {data.task} has no vocabulary to choose the most likely tokens of"
        yield Mistake((*key, "keep"), message, "write keep: hidden, which keeps its few logits whole")

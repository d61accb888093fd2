"""Build the on-policy writer of a training: the task's prompts, and the tokens that end an answer."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import numpy as np

from distill.models.generate import Writing, end_tokens
from distill.pipeline.session import Session
from distill.recipe.on_policy import OnPolicy as Settings
from distill.recipe.schema import Training
from distill.training.on_policy import OnPolicy

LOOK = 200
"""Rows whose answers are looked at for the token that ends them."""


def on_policy_for(session: Session, spec: Training, model: Any) -> OnPolicy | None:
    """Build the on-policy writer of a training; None without `training.on_policy`."""
    if (own := spec.on_policy) is None:
        return None
    task, writing = session.bound_task, writing_for(session, own, model)
    ends = ", ".join(session.tokenizer.convert_ids_to_tokens(sorted(writing.ends))) or "nothing but their length"
    session.say(f"  on-policy: the student writes up to {own.max_new_tokens} tokens; what ends an answer: {ends}")
    answers = partial(task.with_answers, padding=session.corpus.padding)
    return OnPolicy(own.share, spec.precision, session.recipe.seed, task.prompts, writing, answers)


def writing_for(session: Session, spec: Settings, model: Any) -> Writing:
    """Settle how a model answers the prompts of the data."""
    two_stacks, settings = model.config.is_encoder_decoder, getattr(session.bound_task, "settings", {})
    first = settings.get("forced_bos_token_id", getattr(model.generation_config, "forced_bos_token_id", None))
    return Writing(
        spec.max_new_tokens,
        spec.temperature,
        end_tokens(model, [session.tokenizer.eos_token_id, *([] if two_stacks else ends_of_answers(session))]),
        session.corpus.padding,
        length=None if two_stacks else session.recipe.data.max_length,
        vocabulary=session.vocabulary,
        first=first if two_stacks else None,
    )


def ends_of_answers(session: Session) -> list[int]:
    """Find the token that ends most answers of the training data, as the chat template writes them.

    The configs of a model need not know it: many name the end of a text alone.
    """
    train = session.corpus.train
    taken = train.take(range(min(LOOK, len(train))))
    special, found = {*session.tokenizer.added_tokens_decoder}, Counter[int]()
    for ids, learned in zip(taken["input_ids"], taken["learned"], strict=True):
        last = np.flatnonzero(np.diff(learned, append=0) == -1)
        found.update(token for token in ids[last].tolist() if token in special)
    return [token for token, _ in found.most_common(1)]

"""Stage `data`: read, split and tokenise the texts once; every other stage and command reads the result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from distill.data import Corpus, Texts, read_texts, save_corpus, tokenise
from distill.data.sources import source_fingerprint
from distill.errors import InputError
from distill.files import fresh_folder
from distill.models.load import ModelHead, load_config, tokenizer_fingerprint, trained_labels
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage


def work(session: Session) -> None:
    """Tokenise the texts of both splits, and keep them in the run folder."""
    recipe = session.recipe
    texts = read_texts(recipe.data, recipe.seed, session.base)
    if texts.classes and not recipe.teacher.fit:
        texts = _in_trained_order(session, texts)
    corpus = tokenise(texts, recipe.data, session.tokenizer)
    _check_vocabulary(session, corpus)
    with fresh_folder(session.folder.data) as folder:
        save_corpus(corpus, folder / session.folder.corpus.name)


def _in_trained_order(session: Session, texts: Texts) -> Texts:
    """Take the classes of a teacher that is already trained, in its own order."""
    order = trained_labels(session.source)
    unknown = sorted(set(texts.classes) - set(order))
    if unknown:
        raise InputError(
            f"the data has the classes {', '.join(unknown)}, the teacher knows {', '.join(order)}: rename them, "
            f"or add `fit` under `teacher:` to train it on these classes"
        )
    return replace(texts, classes=tuple(order))


def _check_vocabulary(session: Session, corpus: Corpus) -> None:
    """Refuse a tokenizer that writes tokens for which the teacher has no embedding."""
    config = load_config(session.source, ModelHead(""), session.remote_code)
    known = getattr(config.get_text_config(), "vocab_size", None)
    highest = int(max(split.flat.max() for split in (corpus.train, corpus.test)))
    if corpus.task.head == "sequence":  # blocks of a language model are never padded
        highest = max(highest, corpus.padding)
    if known is not None and highest >= known:
        raise InputError(
            f"{session.source}: the tokenizer writes the token {session.tokenizer.convert_ids_to_tokens(highest)!r} "
            f"with id {highest}, and the model has {known} embeddings; the two do not belong together"
        )


def inputs(session: Session) -> dict[str, Any]:
    """List the content of the source, tokenizer and config of the teacher, and how the texts are split and labelled."""
    recipe = session.recipe
    return {
        "source": source_fingerprint(recipe.data.source, session.base),
        "tokenizer": tokenizer_fingerprint(session.source),
        "data": recipe.data.model_dump(mode="json"),
        "own_classes": recipe.teacher.fit is not None,
        "seed": recipe.seed,
    }


STAGE = Stage("data", work, inputs, lambda session: [session.folder.corpus])

"""Stage `data`: read, split and tokenise the rows once; every other stage and command reads the result."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from distill.data import Corpus, Order, load_corpus, prepare
from distill.data.corpus import check_files
from distill.data.prepare import Report
from distill.data.sources import source_fingerprint
from distill.data.summary import describe
from distill.data.tasks.task import Settled
from distill.errors import InputError
from distill.files import fresh_folder, put_back
from distill.models.family import tells_documents_apart
from distill.models.load import ModelHead, load_config, tokenizer_fingerprint, trained_labels
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage, with_version
from distill.recipe.data import SPLITS
from distill.recipe.load import fingerprint


def work(session: Session) -> None:
    """Prepare the corpus, or take it from the cache, and keep it in the run folder."""
    with _cached(fingerprint(with_version(inputs(session))), session.say) as cache:
        corpus = _load_whole(session, cache)
        if corpus is None:
            _prepare(session, cache)
            corpus = load_corpus(cache, session.task)
        else:
            session.say(f"  from the cache, {cache.parent}")
        for line in describe(corpus.summary):
            session.say(line)
        with fresh_folder(session.folder.data) as folder:
            for file in cache.iterdir():
                _link(file, folder / file.name)


def _load_whole(session: Session, cache: Path) -> Corpus | None:
    """Load a corpus from the cache; None where there is none, or it is damaged."""
    if not cache.exists():
        return None
    try:
        corpus = load_corpus(cache, session.task)
        check_files(cache)
        return corpus
    except InputError as error:
        session.say(f"  the cache is damaged, made anew: {error}")
        return None


def _prepare(session: Session, cache: Path) -> None:
    recipe = session.recipe
    config = load_config(session.source, ModelHead(""), session.remote_code)

    def own_order(settled: Settled) -> Settled:
        return settled if recipe.teacher.fit or not settled.classes else _in_trained_order(session, settled)

    with fresh_folder(cache) as folder, _progress_bar() as report:
        order = Order(
            session.task,
            recipe.data,
            session.tokenizer,
            recipe.seed,
            session.base,
            looks=looks(session),
            packs=tells_documents_apart(config),
            own_order=own_order,
        )
        corpus = prepare(order, folder, report)
        _check_vocabulary(session, config, corpus)
    megabytes = sum(file.stat().st_size for file in cache.iterdir()) / 1e6
    session.say(f"  kept in the cache, {cache.parent} ({megabytes:,.1f} MB; it may be deleted at any time)")


@contextmanager
def _progress_bar() -> Iterator[Report]:
    """Show how far the encoding is, where someone is looking at standard error."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks = {split: bar.add_task(f"{split}: tokens", visible=False) for split in SPLITS}
        yield lambda split, done, of: bar.update(tasks[split], completed=done, total=of, visible=True)


def looks(session: Session) -> bool:
    """Tell whether anything looks at held-out examples during training."""
    training = session.recipe.training
    return training.evaluate_every > 0 or training.keep_best is not None or session.recipe.data.validation is not None


@contextmanager
def _cached(key: str, say: Callable[[str], None]) -> Iterator[Path]:
    """Give the folder of one corpus in the cache, held by this process; the cache is the user's own to read."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = Path(os.environ.get("DISTILL_CACHE") or f"{home}/distill").expanduser() / "data"
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(root / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise InputError(f"{root} cannot be the cache: {error.strerror}; set DISTILL_CACHE to a folder") from error
    with os.fdopen(lock, "w"):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("  another run prepares the same data; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        put_back(root / key)
        yield root / key


def _link(file: Path, target: Path) -> None:
    """Give a file a second name, or copy it where that is on another disk; nothing changes a corpus afterwards."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _in_trained_order(session: Session, settled: Settled) -> Settled:
    """Take the classes of a teacher that is already trained, in its own order."""
    order = trained_labels(session.source)
    unknown = sorted(set(settled.classes) - set(order))
    if unknown:
        raise InputError(
            f"the data has the classes {', '.join(unknown)}, the teacher knows {', '.join(order)}: rename them, "
            f"or add `fit` under `teacher:` to train it on these classes"
        )
    return replace(settled, classes=tuple(order))


def _check_vocabulary(session: Session, config: Any, corpus: Any) -> None:
    """Refuse a tokenizer that writes tokens for which the teacher has no embedding."""
    known = getattr(config.get_text_config(), "vocab_size", None)
    highest = max(corpus.padding, *(int(split.highest) for split in corpus.splits.values()))
    if known is not None and highest >= known:
        raise InputError(
            f"{session.source}: the tokenizer writes the token {session.tokenizer.convert_ids_to_tokens(highest)!r} "
            f"with id {highest}, and the model has {known} embeddings; the two do not belong together"
        )


def inputs(session: Session) -> dict[str, Any]:
    """List the content of the sources, tokenizer and config of the teacher, and how rows are split and labelled."""
    recipe = session.recipe
    return {
        "sources": {
            split: [source_fingerprint(source, split, session.base) for source in recipe.data.origins(split)]
            for split in SPLITS
        },
        "tokenizer": tokenizer_fingerprint(session.source),
        "data": recipe.data.model_dump(mode="json"),
        "validation": looks(session),
        "own_classes": recipe.teacher.fit is not None,
        "seed": recipe.seed,
    }


STAGE = Stage("data", work, inputs, lambda session: [session.folder.data])

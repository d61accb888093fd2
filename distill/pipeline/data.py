"""Stage `data`: read, split and tokenise the rows once; every other stage and command reads the result."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

import distill.data
from distill.data import Order, load_corpus, prepare
from distill.data.corpus import FACTS
from distill.data.sources import source_fingerprint
from distill.data.summary import describe
from distill.data.tasks.task import Settled
from distill.errors import InputError
from distill.files import fresh_folder, put_back, sha256_of
from distill.models.family import tells_documents_apart
from distill.models.load import ModelHead, load_config, tokenizer_fingerprint, trained_labels
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage, with_version
from distill.recipe.load import fingerprint


def work(session: Session) -> None:
    """Prepare the corpus, or take it from the cache, and keep it in the run folder."""
    with _cached(fingerprint(with_version(inputs(session)))) as cache:
        if (cache / FACTS).exists():
            session.say(f"  from the cache, {cache.parent}")
        else:
            _prepare(session, cache)
        corpus = load_corpus(cache, session.bound_task)
        for line in describe(corpus.summary):
            session.say(line)
        with fresh_folder(session.folder.data) as folder:
            for file in cache.iterdir():
                _link(file, folder / file.name)


def _prepare(session: Session, cache: Path) -> None:
    recipe = session.recipe
    config = load_config(session.source, ModelHead(""), session.remote_code)

    def own_order(settled: Settled) -> Settled:
        return settled if recipe.teacher.fit or not settled.classes else _in_trained_order(session, settled)

    with fresh_folder(cache) as folder, Progress(transient=True) as bar:
        tasks = {split: bar.add_task(f"{split}: tokens", visible=False) for split in recipe.data.splits}
        order = Order(
            session.bound_task,
            recipe.data,
            session.tokenizer,
            recipe.seed,
            session.base,
            looks=looks(session),
            packs=tells_documents_apart(config),
            own_order=own_order,
        )

        def report(split: str, done: int, of: int) -> None:
            bar.update(tasks[split], completed=done, total=of, visible=True)

        corpus = prepare(order, folder, report)
        _check_vocabulary(session, config, corpus)


def looks(session: Session) -> bool:
    """Tell whether anything looks at held-out examples during training."""
    training = session.recipe.training
    return training.evaluate_every > 0 or training.keep_best is not None or session.recipe.data.validation is not None


@contextmanager
def _cached(key: str) -> Iterator[Path]:
    """Give the folder of one corpus in the cache, held by this process; the cache is the user's own to read."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = Path(os.environ.get("DISTILL_CACHE") or f"{home}/distill").expanduser() / "data"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (root / f"{key}.lock").open("w") as lock:
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
    text = config.get_text_config()
    known, written = getattr(text, "vocab_size", None), getattr(text, "decoder_vocab_size", None)
    highest = max(corpus.padding, *(split.highest() for split in corpus.splits.values()))
    if (target := session.task.target) != "input_ids":
        highest_written = max(split.highest(target) for split in corpus.splits.values())
        if highest_written >= (written or known or highest_written + 1):
            highest, known = highest_written, written or known
    if known is not None and highest >= known:
        raise InputError(
            f"{session.source}: the tokenizer writes the token {session.tokenizer.convert_ids_to_tokens(highest)!r} "
            f"with id {highest}, and the model has {known} embeddings; the two do not belong together"
        )


def inputs(session: Session) -> dict[str, Any]:
    """List the content of the sources, tokenizer and config of the teacher, and how rows are split and labelled."""
    recipe = session.recipe
    files = [recipe.data.columns.get(name, name) for name, own in session.task.columns.items() if own.content]
    return {
        "sources": {
            split: [source_fingerprint(source, session.base, files) for source in recipe.data.origins(split)]
            for split in recipe.data.splits
        },
        "tokenizer": tokenizer_fingerprint(session.source),
        "data": recipe.data.model_dump(mode="json"),
        "validation": looks(session),
        "code": _code_fingerprint(session),
        "own_classes": recipe.teacher.fit is not None,
        "seed": recipe.seed,
    }


def _code_fingerprint(session: Session) -> str:
    """Hash the code that makes a corpus, the user's own task included."""
    files = [*Path(distill.data.__file__).parent.rglob("*.py"), Path(inspect.getfile(type(session.task)))]
    return hashlib.sha256("".join(sorted(map(sha256_of, files))).encode()).hexdigest()


STAGE = Stage("data", work, inputs, lambda session: [session.folder.data])

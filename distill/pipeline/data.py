"""Stage `data`: read, split and tokenise the rows once; every other stage and command reads the result."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

import distill.data
from distill.data import Corpus, load_corpus
from distill.data.corpus import check_files
from distill.data.prepare import Report, prepare
from distill.data.rows import Order
from distill.data.sources import source_fingerprint
from distill.data.summary import describe
from distill.data.tasks.classes import are_numbers, folded
from distill.data.tasks.task import Settled
from distill.errors import InputError
from distill.evaluation.arms import searches
from distill.files import cache_folder, fresh_folder, put_back, read_object, sha256_of
from distill.models.family import tells_documents_apart
from distill.models.load import tokenizer_fingerprint, trained_labels
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage, with_version
from distill.recipe.jsonrows import list_names
from distill.recipe.load import check_teacher, fingerprint
from distill.recipe.locate import teacher_folder
from distill.recipe.teachers import source_names

SEQUENCE_CLASSES = "AutoModelForSequenceClassification"
NAMELESS = re.compile(r"LABEL_\d+")
"""The name that transformers gives to outputs without names."""


def work(session: Session) -> None:
    """Prepare the corpus, or take it from the cache, and keep it in the run folder."""
    with _cached(fingerprint(with_version(inputs(session))), session.say) as cache:
        corpus = _load_whole(session, cache)
        if corpus is None:
            _prepare(session, cache)
            corpus = load_corpus(cache, session.bound_task)
        else:
            session.say(f"  from the cache, {cache.parent}")
        if corpus.settled.about:
            session.say(f"  labels: {corpus.settled.about}")
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
        corpus = load_corpus(cache, session.bound_task)
        check_files(cache)
        return corpus
    except InputError as error:
        session.say(f"  the cache is damaged, made anew: {error}")
        return None


def _prepare(session: Session, cache: Path) -> None:
    recipe = session.recipe
    folders = (session.source, *session.folders_beside.values())
    readers = {folder: session.config_of(folder) for folder in folders}
    config = readers[session.source]

    def own_order(settled: Settled) -> Settled:
        asks = settled.classes or settled.head == "regression"
        return _agree_with_teacher(session, settled) if asks and not recipe.teacher.fit else settled

    with fresh_folder(cache) as folder, _progress_bar(recipe.rows.splits) as report:
        order = Order(
            session.bound_task,
            recipe.rows,
            session.tokenizer,
            recipe.seed,
            session.base,
            looks=looks(session),
            packs=session.packs and all(map(tells_documents_apart, readers.values())),
            teacher=session.source,
            routes={name: at for at, name in enumerate(source_names(recipe.rows))} if recipe.routes else {},
            own_order=own_order,
        )
        for source, own in readers.items():
            _check_padding(session, source, own)
        corpus = prepare(order, folder, report)
        _check_token_types(session, config, corpus)
        _check_vocabulary(session, config, corpus)
        _check_ends(session, config, corpus)
    megabytes = sum(file.stat().st_size for file in cache.iterdir()) / 1e6
    session.say(f"  kept in the cache, {cache.parent} ({megabytes:,.1f} MB; it may be deleted at any time)")


@contextmanager
def _progress_bar(splits: Sequence[str]) -> Iterator[Report]:
    """Show how far the encoding is, where someone is looking at standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _split, _done, _of: None
        return
    with Progress(console=console, transient=True) as bar:
        tasks = {split: bar.add_task(f"{split}: tokens", visible=False) for split in splits}
        yield lambda split, done, of: bar.update(tasks[split], completed=done, total=of, visible=True)


def looks(session: Session) -> bool:
    """Tell whether anything looks at held-out examples during training, or chooses a control's settings by them."""
    recipe, training = session.recipe, session.recipe.training
    asked = training.evaluate_every > 0 or training.keep_best is not None or searches(recipe)
    return asked or recipe.data.validation is not None


@contextmanager
def _cached(key: str, say: Callable[[str], None]) -> Iterator[Path]:
    """Give the folder of one corpus in the cache, held by this process; the cache is the user's own to read."""
    root = cache_folder("data")
    lock = os.open(root / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
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


def _agree_with_teacher(session: Session, settled: Settled) -> Settled:
    """Take the classes in the order of a teacher that is already trained; refuse one trained for other labels."""
    config = session.config_of(session.source)
    order, kind = trained_labels(session.source), config.problem_type
    numbers = config.label2id or {}
    if {*numbers} == {*order} and [numbers[name] for name in order] != [*range(len(order))]:
        raise InputError(f"{session.source}/config.json: id2label and label2id do not number the classes alike, from 0")
    if len(order) == 1 and settled.head == "sequence" and are_numbers(settled.classes):
        settled = Settled("regression", about=f"{settled.about}, all whole numbers: values, as the teacher gives one")
    wanted = session.task.model_settings(settled).get("problem_type", kind)
    if kind not in (None, wanted) or (settled.head == "regression") != (len(order) == 1):
        raise InputError(
            f"the labels are {settled.about}, and the config.json of the teacher says {len(order)} outputs"
            f"{f' and problem_type {kind}' if kind else ''}: give labels of the kind that it was trained on, or add "
            f"`fit` under `teacher:` to train it on these"
        )
    if settled.head == "multi_label" and kind is None:
        settled = replace(settled, about=f"{settled.about}; the teacher's config.json does not say that it gives sets")
    if settled.head == "regression":
        return settled
    stated = session.recipe.data.classes
    return _stated_order(settled, order) if stated else _trained_order(settled, order)


def _stated_order(settled: Settled, order: Sequence[str]) -> Settled:
    """Hold `data.classes` against the outputs of a trained teacher."""
    classes = settled.classes
    if len(classes) != len(order):
        raise InputError(f"data.classes: lists {len(classes)} classes, and the teacher has {len(order)} outputs")
    if set(classes) == set(order) and list(classes) != list(order):
        raise InputError(f"data.classes: the teacher has its classes in another order, {', '.join(order)}; remove it")
    renamed = "" if list(classes) == list(order) else f", which the teacher calls {list_names(order)}"
    return replace(settled, about=f"{settled.about}, {list_names(classes)}{renamed}")


def _trained_order(settled: Settled, order: Sequence[str]) -> Settled:
    """Find the classes of the data among the names of the teacher's outputs; numbers stand for unnamed outputs."""
    classes, nameless = settled.classes, all(NAMELESS.fullmatch(name) for name in order)
    unknown = sorted(set(classes) - set(order))
    if unknown and nameless and are_numbers(classes, below=len(order)):
        about = f"{settled.about}, whole numbers, taken for the numbers of the teacher's outputs"
        return replace(settled, classes=tuple(order), about=about)
    if unknown:
        alike = {folded(name): name for name in classes}
        like = [*classes, *order[len(classes) :]] if nameless else order
        example = ", ".join(alike.get(folded(name), "…") for name in like)
        listed = "; or write the names that the data have in the order of the teacher's outputs, e.g. data.classes: "
        raise InputError(
            f"the data has the classes {list_names(unknown)}, the teacher knows {list_names(order)}"
            f"{', which are no names' if nameless else ''}: rename them"
            f"{f'{listed}[{example}]' if len(classes) <= len(order) else ''}; or add `fit` under `teacher:` to train "
            f"it on these classes"
        )
    more = f", of the {len(order)} that the teacher knows" if len(order) > len(classes) else ""
    return replace(settled, classes=tuple(order), about=f"{settled.about}{more}")


def _check_vocabulary(session: Session, config: Any, corpus: Corpus) -> None:
    """Refuse a tokenizer that writes tokens for which the teacher has no embedding."""
    text = config.get_text_config()
    known, written = getattr(text, "vocab_size", None), getattr(text, "decoder_vocab_size", None)
    highest = max(corpus.padding, *(split.highest() for split in corpus.splits.values()))
    if (target := session.task.target) != "input_ids":
        highest_written = max(split.highest(target) for split in corpus.splits.values())
        if highest_written >= (written or known or highest_written + 1):
            highest, known = highest_written, written or known
    if known is None or highest < known:
        return
    added = [session.tokenizer.convert_tokens_to_ids(token) for token in session.task.added_tokens]
    first = min((number for number in added if number >= known), default=None)
    if session.recipe.teacher.fit and first == known:
        return  # the tokens of the task come right after the teacher's own, and it gets embeddings for them
    what = f"writes the token {session.tokenizer.convert_ids_to_tokens(highest)!r} with id {highest}"
    if session.recipe.teacher.fit and first is not None:
        what = f"has {first} tokens"
    raise InputError(
        f"{session.source}: the tokenizer {what}, and the model has {known} embeddings; the two do not belong together"
    )


def _check_token_types(session: Session, config: Any, corpus: Corpus) -> None:
    """Refuse a tokenizer that writes more token types than the teacher has embeddings for."""
    kind, known = "token_type_ids", getattr(config.get_text_config(), "type_vocab_size", None)
    written = max((split.highest(kind) for split in corpus.splits.values() if kind in split.columns), default=0) + 1
    if known and written > known:
        message = f"the tokenizer writes {written} {kind}, and config.json says type_vocab_size {known}"
        raise InputError(f"{session.source}: {message}; give it a tokenizer that does not write them")


def _check_padding(session: Session, source: Path, config: Any) -> None:
    """Refuse a decoder with classes whose config and tokenizer pad with different tokens.

    Its head reads the last token that is not the config's padding. Another padding would be read instead of the text.
    """
    ours, theirs = session.tokenizer.pad_token_id, getattr(config.get_text_config(), "pad_token_id", None)
    decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    if session.task.auto_class == SEQUENCE_CLASSES and decoder and theirs not in (None, ours):
        raise InputError(
            f"{source}: the tokenizer pads with {session.tokenizer.pad_token!r}, id {ours}, and config.json "
            f"says pad_token_id {theirs}, by which the head finds the last token of a text; write one in both"
        )


def _check_ends(session: Session, config: Any, corpus: Corpus) -> None:
    """Refuse texts without an end token, or with others of their own, where a head of classes reads the last one.

    That of an encoder-decoder wants as many in every text of a batch.
    """
    if session.task.auto_class != SEQUENCE_CLASSES or not config.is_encoder_decoder:
        return
    for name, split in corpus.splits.items():
        ends = {int((split[row] == config.eos_token_id).sum()) for row in range(len(split))}
        if len(ends) > 1 or 0 in ends:
            raise InputError(
                f"{session.source}: a head of classes reads the last end token, id {config.eos_token_id}, and wants as "
                f"many in every text; in the {name} split there are {' or '.join(map(str, sorted(ends)))}: take it out "
                f"of the texts, or let the tokenizer write it"
            )


def inputs(session: Session) -> dict[str, Any]:
    """List the content of the sources, tokenizer and config of the teacher, and how rows are split and labelled."""
    recipe, rows = session.recipe, session.recipe.rows
    files = [recipe.data.columns.get(name, name) for name, own in session.task.columns.items() if own.content]
    return {
        "sources": {
            split: [source_fingerprint(source, split, session.base, files) for source in rows.origins(split)]
            for split in rows.splits
        },
        "tokenizer": tokenizer_fingerprint(session.source),
        "data": rows.model_dump(mode="json"),
        "validation": looks(session),
        "code": _code_fingerprint(session),
        "own_classes": recipe.teacher.fit is not None,
        "seed": recipe.seed,
        **({"routes": source_names(rows)} if recipe.routes else {}),
        **({} if session.packs else {"packs": False}),
        **{
            # By these other models decide how rows are packed and padded.
            f"read_by.{key}": [read_object(folder / "config.json").get(name) for name in ("model_type", "pad_token_id")]
            for key, folder in session.folders_beside.items()
        },
    }


def _code_fingerprint(session: Session) -> str:
    """Hash the code that makes a corpus, the user's own task included."""
    files = [*Path(distill.data.__file__).parent.rglob("*.py"), Path(inspect.getfile(type(session.task)))]
    return hashlib.sha256("".join(sorted(map(sha256_of, files))).encode()).hexdigest()


def check(session: Session) -> None:
    """Look at a teacher from the hub, which nobody could when the recipe was read.

    Raises:
        InputError: With everything that is wrong with it or does not fit it.
    """
    if teacher_folder(session.recipe.teacher.model, session.base) is None:
        check_teacher(session.recipe, session.source)


STAGE = Stage("data", work, inputs, lambda session: [session.folder.data], check=check)

"""Check that the models of one run tokenise every text alike and have their classes in the same order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

from distill.data import Corpus
from distill.errors import InputError
from distill.models.load import load_tokenizer, trained_labels
from distill.pipeline.session import Session
from distill.recipe.load import check_beside
from distill.recipe.locate import teacher_folder, teacher_size

OWN_TEXTS, OWN_CHARACTERS = 512, 400
"""Training examples whose texts are tokenised by every tokenizer, and characters of each."""
ODD = (
    *("", " ", "   ", "\t", "\n\n", "\r\n", "\u00a0", "\u200b", "\ufeff\u202e", "The quick brown fox", "don't  STOP!?"),
    *("3.14159", "1234567890", "2026-11-26T23:59", "日本語の文章", "汉字\u3002", "한국어", "Привет", "مرحبا"),
    *("Straße \u00bd", "e\u0301a\u0308n\u0303", "😀", "👩\u200d👧🏽🇩🇪", "∑∫≤≠√", "def f(x):\n    return x"),
    *("<b>&amp;</b>", "https://x.org/?q=a%20b#c", "\\n\\t", "a" * 40, "</s><s>[MASK]<|endoftext|>"),
    *("[CLS] [SEP] <pad> <unk>", "<|im_start|>user\nhi<|im_end|>", "x_y-z/w.v", "$5,000.00 €20 £3"),
)  # fmt: skip
"""Texts on which tokenizers differ: alone and in pairs, more than a thousand."""


def check_vocabularies(session: Session) -> None:
    """Refuse a model with other tokens than the first teacher, before the data are read.

    Raises:
        InputError: With the first differing token.
    """
    folders = session.folders_beside
    for key, folder in folders.items():
        if teacher_folder(session.recipe.models[key].model, session.base) is None:  # it was not there to be looked at
            check_beside(session.recipe, key, session.source, folder)
    if not folders:
        return
    base, have = load_tokenizer(session.source, session.remote_code), teacher_size(session.source).vocabulary
    for key, folder in folders.items():
        new = [token for token in session.task.added_tokens if token not in base.get_added_vocab()]
        if new and key != "student.from":
            raise InputError(
                f"{key}: task: {session.task.name} writes {', '.join(new)}, which only the first is fitted for"
            )
        _check_start(session, key, folder)
        rows, needed = teacher_size(folder).vocabulary, min(len(base), have or len(base))
        if rows is not None and rows < needed:
            raise InputError(
                f"{key}: {folder} has embeddings for {rows:,} tokens, and the teacher's tokenizer writes {needed:,}; "
                f"name a model of the teacher's tokenizer"
            )
        if None not in (rows, have) and rows != have:
            session.say_once(
                f"  {key}: {rows:,} rows of embeddings, the teacher has {have:,}; the first {needed:,} are tokens"
            )
        if not has_tokenizer(folder):
            session.say_once(f"  {key} comes without a tokenizer; it is taken to read the teacher's tokens")
            continue
        own = load_tokenizer(folder, session.remote_code)
        _compare_vocabularies(key, base.get_vocab(), own.get_vocab())
        for line in _differences(key, base, own):
            session.say_once(line)


def _check_start(session: Session, key: str, folder: Path) -> None:
    """Refuse a decoder that begins with another token where the student writes: that begins with one for all."""
    if session.recipe.training.on_policy is None:
        return
    configs = map(session.config_of, (session.source, folder))
    start, own = (getattr(config, "decoder_start_token_id", None) for config in configs)
    if own != start:
        raise InputError(
            f"{key}: its decoder begins with token {own} (decoder_start_token_id in config.json), the teacher's with "
            f"{start}; with training.on_policy both must begin alike: remove that section, or name another model"
        )


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a model folder holds a tokenizer."""
    return any(folder.glob("tokenizer*")) or any(folder.glob("*vocab*"))


def _compare_vocabularies(key: str, base: dict[str, int], own: dict[str, int]) -> None:
    wrong = [(number, token) for token, number in base.items() if own.get(token) != number]
    if not wrong:
        return
    number, token = min(wrong)
    other = next((name for name, place in own.items() if place == number), None)
    raise InputError(
        f"{key}: its tokenizer is not the teacher's: token {number} is {token!r} there and "
        f"{'not known' if other is None else repr(other)} here, the first of {len(wrong):,} that differ. Logits and "
        f"positions of two vocabularies cannot be compared: name a model of the teacher's tokenizer"
        f"{', or cut the student from the teacher (student.layers)' if key == 'student.from' else ''}"
    )


def _differences(key: str, base: Any, own: Any) -> Iterator[str]:
    """Yield a line for each way in which a tokenizer with the same tokens is another; the first teacher's is used."""
    more = sorted(set(own.get_vocab()) - set(base.get_vocab()))
    if more:
        yield f"  {key}: its tokenizer has {len(more)} tokens more, e.g. {more[0]!r}, which nobody writes here"
    theirs, ours = base.special_tokens_map, own.special_tokens_map
    parts = [
        f"{name} is {ours.get(name)!r}, the teacher's {theirs.get(name)!r}"
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]
    if base.chat_template != own.chat_template:
        parts.append("the chat template is " + ("another one" if own.chat_template else "missing"))
    if parts:
        yield f"  {key}: in its tokenizer {'; '.join(parts)}; the teacher's is used, and released"


def probe_tokenizers(session: Session) -> None:
    """Refuse a tokenizer that writes or reads some text in another way than the first teacher's.

    Raises:
        InputError: With the text and its tokens on both sides.
    """
    folders = {key: folder for key, folder in session.folders_beside.items() if has_tokenizer(folder)}
    if not folders:
        return
    base = load_tokenizer(session.source, session.remote_code)
    texts = list(probes(session.corpus, base))
    rows = [base(text, add_special_tokens=False)["input_ids"] for text in texts]
    framed = base(texts[-1])["input_ids"]
    for key, folder in folders.items():
        own = load_tokenizer(folder, session.remote_code)
        for text, ids in zip(texts, rows, strict=True):
            theirs = own(text, add_special_tokens=False)["input_ids"]
            if theirs != ids:
                raise InputError(
                    f"{key}: its tokenizer has the teacher's tokens, and writes {text[:60]!r} as {theirs[:12]}, the "
                    f"teacher's as {ids[:12]}; name a model of the teacher's tokenizer"
                )
            if own.decode(ids) != base.decode(ids):
                raise InputError(
                    f"{key}: its tokenizer reads the tokens {ids[:12]} as {own.decode(ids)[:60]!r}, the teacher's as "
                    f"{base.decode(ids)[:60]!r}; name a model of the teacher's tokenizer"
                )
        frame = "" if own(texts[-1])["input_ids"] == framed else "; around a text it writes other special tokens"
        session.say_once(f"  {key}: the teacher's tokens for {len(texts):,} texts, both ways{frame}")


def probes(corpus: Corpus, tokenizer: Any) -> Iterator[str]:
    """Yield texts to try tokenizers on: of training examples, and odd ones."""
    step = max(1, len(corpus.train) // OWN_TEXTS)
    for index in islice(range(0, len(corpus.train), step), OWN_TEXTS):
        text = tokenizer.decode(corpus.train[index], skip_special_tokens=True)[:OWN_CHARACTERS]
        yield from (text, text.title())
    yield from ODD
    yield from map("".join, product(ODD, ODD))


def check_same_classes(names: Sequence[str], classes: Sequence[str], key: str, whose: str) -> None:
    """Refuse a model that was trained for other classes, or for these in another order. Raises InputError."""
    if len(names) != len(classes):
        raise InputError(f"{key}: it has {len(names)} classes, {whose} {len(classes)}")
    for number, (own, other) in enumerate(zip(names, classes, strict=True)):
        if own != other:
            raise InputError(
                f"{key}: its class {number} is {own!r} (id2label in its config.json), that of {whose} {other!r}; the "
                f"classes must be the same in the same order"
            )


def check_members(session: Session) -> None:
    """Refuse teachers with other classes than the first, or in another order. Raises InputError."""
    recipe, corpus = session.recipe, session.corpus
    if not recipe.mixes or not corpus.classes:
        return
    order = corpus.classes if recipe.teacher.fit else trained_labels(session.source)
    for number, (_, folder) in enumerate(session.teachers[1:], start=1):
        check_same_classes(trained_labels(folder), order, f"teachers.{number}.model", "the first teacher")

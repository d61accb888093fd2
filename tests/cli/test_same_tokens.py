"""Models of one run must write and read the same tokens: what is refused before any training, and what is only said."""

from __future__ import annotations

import json

import pytest
from given import GIVEN, TINY, small
from tiny import WORDS, tiny_project
from tokenizers import decoders, normalizers
from transformers import AutoTokenizer

from distill.cli import main
from distill.data import load_corpus
from distill.data.tasks import TASKS
from distill.models.load import load_tokenizer
from distill.pipeline.compatible import probes

VERB = ["plan", "teacher.fit={steps: 1, batch_size: 8, save_every: 1}"]


@pytest.fixture
def project(tmp_path):
    recipe = tiny_project(tmp_path, GIVEN)
    small(tmp_path, **TINY)
    return recipe


def run(recipe, capsys):
    code = main([VERB[0], str(recipe), *VERB[1:], "--out", str(recipe.parent / "run")])
    return code, capsys.readouterr().err


def change(recipe, edit):
    """Edit the student's tokenizer.json."""
    path = recipe.parent / "small" / "tokenizer.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_another_vocabulary_is_refused_with_the_first_token_that_differs(project, capsys):
    def swap(content):
        vocabulary = content["model"]["vocab"]
        vocabulary[WORDS[2]], vocabulary[WORDS[5]] = vocabulary[WORDS[5]], vocabulary[WORDS[2]]

    change(project, swap)
    code, said = run(project, capsys)
    assert code == 2 and "data: started" not in said
    assert (
        f"student.from: its tokenizer is not the teacher's: token 6 is {WORDS[2]!r} there and {WORDS[5]!r} here" in said
    )
    assert "the first of 2 that differ" in said and "cut the student from the teacher (student.layers)" in said


def test_a_token_that_the_student_lacks_is_refused(project, capsys):
    change(project, lambda content: content["model"]["vocab"].pop(WORDS[-1]))
    code, said = run(project, capsys)
    assert code == 2
    assert f"token {len(WORDS) + 3} is {WORDS[-1]!r} there and not known here, the first of 1 that differ" in said


def test_the_same_tokens_with_another_normalizer_are_refused_by_the_probe(project, capsys):
    tokenizer = AutoTokenizer.from_pretrained(project.parent / "small")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(project.parent / "small")
    code, said = run(project, capsys)
    assert code == 2 and "teacher: started" not in said
    assert "student.from: its tokenizer has the teacher's tokens, and writes '" in said


def test_the_same_tokens_read_as_other_texts_are_refused_by_the_probe(project, capsys):
    tokenizer = AutoTokenizer.from_pretrained(project.parent / "small")
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.save_pretrained(project.parent / "small")
    code, said = run(project, capsys)
    assert code == 2 and "student.from: its tokenizer reads the tokens" in said


def test_fewer_embeddings_than_tokens_are_refused(project, capsys):
    small(project.parent, **TINY, vocab_size=len(WORDS) + 3)
    for file in project.parent.glob("small/*token*"):  # beside a tokenizer this is seen when the recipe is read
        file.unlink()
    code, said = run(project, capsys)
    words = f"has embeddings for {len(WORDS) + 3} tokens, and the teacher's tokenizer writes {len(WORDS) + 4}"
    assert code == 2 and words in said


def test_other_special_tokens_more_tokens_and_a_missing_chat_template_are_said(project, capsys):
    teacher = AutoTokenizer.from_pretrained(project.parent / "teacher")
    teacher.chat_template = "{{ messages }}"
    teacher.save_pretrained(project.parent / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(project.parent / "small")
    tokenizer.add_tokens(["<extra>"])
    tokenizer.eos_token = "[CLS]"
    tokenizer.save_pretrained(project.parent / "small")
    code, said = run(project, capsys)
    assert code == 0
    assert "student.from: its tokenizer has 1 tokens more, e.g. '<extra>', which nobody writes here" in said
    assert "eos_token is '[CLS]', the teacher's '[SEP]'; the chat template is missing; the teacher's is used" in said


def test_a_student_without_a_tokenizer_is_said_to_be_taken_on_trust(project, capsys):
    for file in project.parent.glob("small/*token*"):
        file.unlink()
    code, said = run(project, capsys)
    assert code == 0 and "student.from comes without a tokenizer; it is taken to read the teacher's tokens" in said


def test_more_than_a_thousand_texts_are_tried_of_which_some_are_the_runs_own(project, capsys):
    code, said = run(project, capsys)
    assert code == 0 and "student.from: the teacher's tokens for 1,388 texts, both ways\n" in said
    tokenizer = load_tokenizer(project.parent / "teacher")
    corpus = load_corpus(project.parent / "run" / "data", TASKS["classification"]())
    texts = list(probes(corpus, tokenizer))
    assert len(texts) == 1388 and texts[0] == tokenizer.decode(corpus.train[0], skip_special_tokens=True)
    assert any("日本語" in text for text in texts) and any("[MASK]" in text for text in texts)

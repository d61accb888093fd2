"""What `training.on_policy` does not go with, each with its place and the fix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.errors import RecipeError
from distill.recipe import load_recipe

GOOD = """\
name: tiny
teacher: {model: org/some-model, revision: abc}
student: {layers: {keep: 3}}
data:
  source: ./talks.jsonl
  task: chat
  max_length: 64
losses:
  - {match: labels, weight: 0.3}
  - {match: logits, loss: reverse_kl}
training:
  steps: 5
  on_policy: {share: 0.5, max_new_tokens: 63, temperature: 0.7}
"""


@pytest.fixture
def write(tmp_path):
    row = dict.fromkeys(("prompt", "completion", "text", "label", "source", "target"), "a")
    (tmp_path / "talks.jsonl").write_text(json.dumps(row) + "\n")

    def write_recipe(*changes: tuple[str, str]) -> Path:
        text = GOOD
        for old, new in changes:
            assert text.count(old) == 1
            text = text.replace(old, new)
        (tmp_path / "recipe.yaml").write_text(text)
        return tmp_path / "recipe.yaml"

    return write_recipe


@pytest.mark.parametrize(
    ("change", "line", "key", "words"),
    [
        (("task: chat", "task: causal_lm"), 13, "training.on_policy", "causal_lm have no prompt (use chat or seq2seq)"),
        (("task: chat", "task: classification"), 13, "training.on_policy", "classification have no prompt"),
        (("task: chat", "task: chat\n  learn_from: all"), 14, "training.on_policy", "learn_from: all does not say"),
        (("  - {match: logits, loss: reverse_kl}\n", ""), 12, "training.on_policy", "no term compares with"),
        (("  steps: 5", "  tokens: 5000"), 12, "training.tokens", "is not known (give steps or epochs)"),
        (("tokens: 63", "tokens: 64"), 13, "training.on_policy.max_new_tokens", "64 do not fit"),
        (("share: 0.5", "share: 1"), 9, "losses.0.match", "has no effect: with on_policy.share: 1"),
        (("share: 0.5", "share: 0"), 13, "training.on_policy.share", "expected above 0"),
        (("share: 0.5", "share: 1.5"), 13, "training.on_policy.share", "expected at most 1"),
        (("temperature: 0.7", "temperature: -1"), 13, "training.on_policy.temperature", "expected at least 0"),
        (("temperature: 0.7", "top_p: 0.9"), 13, "training.on_policy.top_p", "unknown key"),
    ],
)  # fmt: skip
def test_what_on_policy_does_not_go_with_is_refused_with_its_place(write, change, line, key, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(change))
    (problem,) = caught.value.problems
    assert f":{line}:" in problem.where and problem.key == key
    assert words in f"{problem.message} ({problem.fix})"


def test_what_goes_with_it_is_accepted_and_a_target_has_its_own_length(write):
    assert load_recipe(write()).training.on_policy.max_new_tokens == 63
    seq2seq = ("task: chat\n  max_length: 64", "task: seq2seq\n  max_length: 20\n  max_target_length: 63")
    assert load_recipe(write(seq2seq)).training.on_policy.share == 0.5
    assert load_recipe(write(("temperature: 0.7", "temperature: 0"))).training.on_policy.temperature == 0
    own = load_recipe(write(("  on_policy: {share: 0.5, max_new_tokens: 63, temperature: 0.7}\n", "")))
    assert own.training.on_policy is None


def test_a_cached_teacher_cannot_have_been_asked_about_what_is_not_yet_written(write):
    path = write()
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["teacher.cache={keep: hidden}"])
    (problem,) = caught.value.problems
    assert problem.key == "teacher.cache" and "what the student will write is not known" in problem.message

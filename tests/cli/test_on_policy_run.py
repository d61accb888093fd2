"""Students that learn from their own answers, from the recipe to a gated release."""

from __future__ import annotations

import json

import pytest
from test_language_tasks import CHAT, conversations, save_teacher, with_stock_transformers
from test_language_tasks import RECIPE as LANGUAGE
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from two_stacks import text_project

from distill.cli import main
from distill.training import read_records

CHATTING = LANGUAGE.replace("{{match: logits}}", "{{match: logits, loss: reverse_kl}}")


def run(recipe, folder, *overrides, verb="run"):
    assert main([verb, str(recipe), *overrides, "--out", str(folder)]) == 0
    found = json.loads((folder / "evaluation.json").read_text())
    return {arm["name"]: arm["metrics"] for arm in found["arms"]}


def own_figures(folder):
    return [record["on_policy"] for record in read_records(folder / "metrics.jsonl") if "on_policy" in record]


@pytest.mark.slow
def test_a_chat_model_that_answers_itself_is_taught_and_released(tmp_path, capsys):
    save_teacher(tmp_path / "teacher", "llama", **CHAT)
    rows = "".join(json.dumps(row) + "\n" for row in conversations())
    (tmp_path / "data.jsonl").write_text(rows)
    (tmp_path / "recipe.yaml").write_text(CHATTING.format(task="chat", fit=120, steps=60, data="limit: 10000"))
    own = ["training.on_policy={share: 1, max_new_tokens: 10}", "training.micro_batch_size=8"]
    arms = run(
        tmp_path / "recipe.yaml", tmp_path / "run", *own, "evaluation.arms=[teacher, cut, distilled, labels_only]"
    )
    assert arms["distilled"]["kl"] < arms["cut"]["kl"] / 4
    figures = own_figures(tmp_path / "run")
    assert [each["share"] for each in figures] == [1] * 6
    assert figures[-1]["ended_share"] == 1 and figures[-1]["mean_tokens"] == pytest.approx(
        6, abs=0.5
    )  # says … <|im_end|>
    assert not own_figures(tmp_path / "run/controls/labels_only")  # nobody would score its answers
    said = capsys.readouterr()
    assert "the student writes up to 10 tokens; what ends an answer: <|im_end|>" in said.err
    card = (tmp_path / "run/release/README.md").read_text()
    assert "100.0 % of the micro-batches, drawn by lot: answers that the student wrote, up to 10 tokens" in card
    talk = [{"role": "user", "content": "the black owl"}]
    own_way = "max_new_tokens=20, do_sample=False"  # by itself the pipeline draws its tokens
    answer = with_stock_transformers(
        f"said = pipeline('text-generation', {str(tmp_path / 'run/release')!r}, {own_way})({talk})\n"
        "print(said[0]['generated_text'][-1]['content'].strip())"
    )
    assert answer.strip() == "says hoot and looks dark"
    assert main(["plan", str(tmp_path / "recipe.yaml"), *own, "--out", str(tmp_path / "run")]) == 0
    assert "what the student writes is not counted (on_policy)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_that_writes_its_own_targets_is_taught_and_released(tmp_path, family):
    recipe = text_project(tmp_path, family)
    own = ["training.on_policy={share: 0.5, max_new_tokens: 6}", "training.micro_batch_size=8"]
    arms = run(recipe, tmp_path / "run", *own)
    assert arms["distilled"]["kl"] < arms["cut"]["kl"]
    figures = own_figures(tmp_path / "run")
    assert 0.3 < sum(each["share"] for each in figures) / len(figures) < 0.7
    assert figures[-1]["mean_tokens"] > 3 and figures[-1]["short_share"] == 0
    assert (tmp_path / "run/release/model.safetensors").exists()


def test_a_task_of_the_users_own_without_prompts_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_task.py").write_text(
        "from distill.data.tasks.seq2seq import Seq2Seq\n\n\n"
        "class Mine(Seq2Seq):\n    name = 'mine'\n    prompted = False\n    metrics = ('perplexity',)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = text_project(tmp_path, "t5")
    own = ["data.task=own_task:Mine", "training.on_policy={max_new_tokens: 6}"]
    assert main(["run", str(recipe), *own, "--out", str(tmp_path / "run")]) == 2
    assert "task mine does not say what is a prompt" in " ".join(capsys.readouterr().err.split())


def test_a_student_whose_decoder_begins_with_another_token_is_refused(tmp_path, capsys):
    recipe = text_project(tmp_path, "t5")
    config = AutoConfig.from_pretrained(tmp_path / "teacher", decoder_start_token_id=3)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "other")
    own = ["training.on_policy={share: 0.5, max_new_tokens: 6}", "training.micro_batch_size=8"]
    given = ["student={from: ./other}", "evaluation.arms=[teacher, distilled]"]
    assert main(["plan", str(recipe), *own, *given, "--out", str(tmp_path / "run")]) == 2
    assert "student.from: its decoder begins with token 3" in capsys.readouterr().err

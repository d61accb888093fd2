"""Figures that a stranger can check, from a recipe to evaluation.json, terminal and card."""

from __future__ import annotations

import json

import pytest
from conversations import byte_tokenizer
from safetensors.numpy import load_file
from tiny import RECIPE, tiny_config, tiny_project

from distill.cli import main
from distill.evaluation import intervals
from distill.pipeline import RunDir, Session, data, run_stages
from distill.recipe import load_recipe

pytestmark = pytest.mark.slow

LM = """\
name: tiny
seed: 1
teacher: {model: ./teacher, init: random, fit: {steps: 25, batch_size: 16, lr: 3e-3}}
student: {layers: {keep: 2}, mlp: {keep: 0.5, multiple_of: 8}, calibration: {examples: 8, batch_size: 8}}
data: {source: {source: ./texts.jsonl}, task: causal_lm, max_length: 48}
losses: [{match: logits}]
training: {steps: 8, batch_size: 8, lr: 1e-3}
evaluation:
  arms: [teacher, cut, distilled]
  sets:
    own: {source: ./texts.jsonl, limit: 20}
    some: [./mixed.jsonl]
    manual: {source: stdlib-docstrings, limit: 12}
release: {license: apache-2.0}
"""


@pytest.fixture(autouse=True, scope="module")
def fewer_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "RESAMPLES", 100)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, fewer_draws):
    """A language model with three sets: the source of the training, a file with some of its rows, a built-in source."""
    folder = tmp_path_factory.mktemp("figures")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "teacher")
    tiny_config("llama", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id).save_pretrained(
        folder / "teacher"
    )
    texts = [
        f"the {number}. cat sees {number % 7} dogs and {'no' if number % 2 else 'one'} owl" for number in range(80)
    ]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "texts.jsonl").write_text("".join(lines))
    others = [json.dumps({"text": f"a song of {number} birds"}) + "\n" for number in range(12)]
    (folder / "mixed.jsonl").write_text("".join([*others, *lines[:15]]))
    (folder / "recipe.yaml").write_text(LM)
    assert main(["run", str(folder / "recipe.yaml"), "--out", str(folder / "run"), "--accept-weak-teacher"]) == 0
    return folder / "run"


def test_every_arm_is_measured_on_every_set_with_intervals_and_paired_differences(run, capsys):
    found = json.loads((run / "evaluation.json").read_text())
    assert found["sets"].keys() == {"own", "some", "manual"}
    for own in (found, *found["sets"].values()):
        assert [arm["name"] for arm in own["arms"]] == ["teacher", "cut", "distilled"]
        assert [pair["against"] for pair in own["differences"]] == ["teacher", "cut"]
        assert own["drawn"]["number"] >= 8
        for arm in own["arms"][1:]:
            for name, interval in arm["intervals"].items():
                assert interval["low"] < interval["high"], (name, interval)
                assert interval["low"] <= arm["metrics"][name] <= interval["high"]
        assert "kl" not in own["differences"][0]["metrics"] and "kl" in own["differences"][1]["metrics"]
        loss = {arm["name"]: arm["metrics"]["loss"] for arm in own["arms"]}
        pair = own["differences"][1]["metrics"]["loss"]
        assert pair["value"] == loss["distilled"] - loss["cut"] and pair["low"] < pair["value"] < pair["high"]
    assert found["drawn"]["unit"] == "documents" and found["per_class"] is None
    rows = load_file(run / "predictions/distilled.sets.manual.safetensors")
    assert len({*rows["document"].tolist()}) == found["sets"]["manual"]["drawn"]["number"] <= 12


def test_sets_that_were_trained_on_are_known_by_their_source_and_by_their_rows(run):
    sets = json.loads((run / "evaluation.json").read_text())["sets"]
    assert sets["own"]["trained_on"]["same_source"] and sets["own"]["trained_on"]["rows"] > 0
    some = sets["some"]["trained_on"]
    assert not some["same_source"] and some["of"] == 27 and 0 < some["rows"] <= 15
    assert sets["manual"]["trained_on"] == {"same_source": False, "rows": 0, "of": 12}


def test_the_card_says_what_was_kept_on_the_sets_that_were_not_trained_on(run):
    card = (run / "release/README.md").read_text()
    assert "On manual, which was not trained on: perplexity" in card
    assert "own was trained on (from the source of the training rows" in card
    assert "some was trained on (" in card and "of its 27 rows are training rows)" in card
    assert "On other texts, manual:" in card and "On other texts, own (trained on:" in card
    assert "distilled less cut" in card and "intervals of 95%" in card
    for words in ("where the bytes are", "decode, tokens/s", "student, bf16", "peak memory", "p90"):
        assert words in card
    recipe = (run / "release/recipe.yaml").read_text()
    assert "./mixed.jsonl" in recipe and str(run.parent) not in recipe + card


def test_the_terminal_shows_intervals_and_every_set(run, capsys):
    assert main(["evaluate", str(run.parent / "recipe.yaml"), "--out", str(run), "--accept-weak-teacher"]) == 0
    printed = capsys.readouterr()
    assert "manual (not trained on)" in printed.out and "own (from the source of" in printed.out
    assert " [" in printed.out and "where the bytes are" in printed.out
    assert "evaluate: unchanged" in printed.err or "unchanged" in printed.err


def test_efficiency_has_the_bytes_by_part_and_the_speed_of_writing_in_both_dtypes(run):
    found = json.loads((run / "evaluation.json").read_text())["efficiency"]
    assert list(found["models"]) == ["teacher", "student", "teacher, bf16", "student, bf16"]
    for model in found["models"].values():
        assert sum(model["parts"].values()) == model["bytes"] < model["peak_bytes"]
        assert model["throughputs"].keys() == {"1", "8", "32"} and model["prefill"] > 0
    teacher, student = (found["models"][name]["parts"] for name in ("teacher", "student"))
    assert student["embeddings"] == teacher["embeddings"] and student["mlp"] < teacher["mlp"]


def test_another_set_changes_the_evaluation_and_no_training(tmp_path):
    recipe = tiny_project(tmp_path, RECIPE)
    rows = (tmp_path / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "held.jsonl").write_text("".join(rows[:40]))
    fast = [
        "evaluation.efficiency=false",
        "training.steps=2",
        "data.labelled=null",
        "evaluation.arms=[teacher, distilled]",
    ]
    run = ["--out", str(tmp_path / "run"), "--accept-weak-teacher"]
    assert main(["run", str(recipe), *fast, *run]) == 0
    before = json.loads((tmp_path / "run/evaluation.json").read_text())
    stamps = {file.name: file.read_bytes() for file in (tmp_path / "run/stages").iterdir()}
    assert main(["run", str(recipe), *fast, "evaluation.sets={held: ./held.jsonl}", *run]) == 0
    after = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert {name for name, own in stamps.items() if (tmp_path / "run/stages" / name).read_bytes() != own} == {
        "data.json", "evaluate.json", "release.json",
    }  # fmt: skip
    assert after["arms"] == before["arms"]
    held = after["sets"]["held"]
    assert held["trained_on"]["rows"] > 20 and held["examples"] == held["trained_on"]["of"]
    classes = before["per_class"]["classes"]["distilled"]
    assert sum(own["true"] for own in classes.values()) == before["data"]["examples"]
    counted = before["per_class"]["confusion"]["distilled"]
    right = sum(times for true, predicted, times in counted if true == predicted)
    accuracy = before["arms"][1]["metrics"]["accuracy"]
    assert right / before["data"]["examples"] == pytest.approx(accuracy)
    card = (tmp_path / "run/release/README.md").read_text()
    assert "## Classes" in card and "most often taken for" in card


def test_training_rows_stay_where_a_set_has_them_and_leave_the_test(tmp_path):
    tiny_project(tmp_path)
    rows = (tmp_path / "data.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("held.jsonl", rows[:40]), ("test.jsonl", rows[30:60])):
        (tmp_path / name).write_text("".join(part))
    wanted = ["evaluation.sets={held: ./held.jsonl}", "data.test=./test.jsonl", "data.labelled=null"]
    recipe = load_recipe(tmp_path / "recipe.yaml", wanted)
    session = Session(recipe, tmp_path, RunDir(tmp_path / "run"), say=lambda _line: None)
    run_stages(session, [data.STAGE])
    summary = session.corpus.summary
    assert summary["train"]["rows"]["also_in_test"] == 30
    assert not [reason for reason in summary["train"]["rows"] if "held" in reason]
    assert 20 < summary["sets.held"]["rows"]["also_in_training_kept"] <= 30  # ten are in the test, some looked at

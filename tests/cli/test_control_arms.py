"""The arms that the student has to beat, from one recipe through the command line: trained, chosen, drawn, repeated."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from forked import Processes
from safetensors.torch import load_file
from tiny import tiny_project
from two_stacks import text_project

from distill.cli import main
from distill.models.plan import StudentPlan
from distill.pipeline import RunDir, Session, predictions
from distill.pipeline.data import looks
from distill.pipeline.train import measure_held_out
from distill.recipe import load_recipe
from distill.student import build_student

GRID = "evaluation.controls={labels_only: {steps: 6, grid: {lr: [1e-7, 3e-3]}}, random_cut: {lr: 2e-3}}"
ALL = [
    "evaluation.arms=[teacher, cut, distilled, labels_only, majority, random_cut, from_scratch]",
    GRID,
    "evaluation.metrics=[loss, accuracy]",
    "evaluation.efficiency=false",
    "training={steps: 4, batch_size: 8, micro_batch_size: 4, lr: 1e-3, save_every: 2, evaluate_every: 9}",
    "teacher.fit.steps=20",
    "data.labelled=48",
]
CONTROLS = ("labels_only", "random_cut", "from_scratch")


def distill(*arguments, code=0):
    """Run the command line in this process, and return what it said."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = main([str(argument) for argument in arguments])
    assert got == code, err.getvalue()
    return SimpleNamespace(printed=out.getvalue(), lines=err.getvalue().splitlines())


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(first, second):
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def evaluation(run):
    return json.loads((run / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arms")
    recipe, run = tiny_project(folder), folder / "run"
    done = distill("evaluate", recipe, *ALL, "--out", run)
    session = Session(load_recipe(recipe, ALL), folder, RunDir(run), say=lambda _line: None)
    return SimpleNamespace(recipe=recipe, run=run, done=done, session=session)


@pytest.fixture
def copied(finished, tmp_path):
    """A run of one's own, from the same data and teacher."""
    shutil.copytree(finished.recipe.parent, tmp_path / "own")
    return SimpleNamespace(recipe=tmp_path / "own/recipe.yaml", run=tmp_path / "own/run")


def test_every_arm_is_measured_with_its_own_length_and_rate_and_none_is_left_out(finished):
    found = evaluation(finished.run)
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert list(arms) == ["teacher", "cut", "distilled", "labels_only", "majority", "random_cut", "from_scratch"]
    budgets = {name: (arm["steps"], arm.get("lr")) for name, arm in arms.items()}
    assert budgets == {
        **dict.fromkeys(("teacher", "cut", "majority"), (0, None)),
        "distilled": (4, 1e-3),
        "labels_only": (6, 3e-3),
        "random_cut": (4, 2e-3),
        "from_scratch": (4, 1e-3),
    }
    assert all(arms[name]["tokens"] > 0 for name in ("distilled", *CONTROLS))
    assert list(found["rivals"]) == [*CONTROLS, "cut", "majority"] and found["not_run"] == {}
    assert all(name in finished.done.printed for name in arms)
    for name in CONTROLS:
        records = (finished.run / "controls" / name / "metrics.jsonl").read_text().splitlines()
        terms = {term for record in map(json.loads, records) if record["event"] == "train" for term in record["terms"]}
        assert (terms == {"labels"}) == (name == "labels_only")


def test_the_majority_answers_the_most_frequent_training_label(finished):
    corpus, found = finished.session.corpus, evaluation(finished.run)
    labels = [int(corpus.train.take([index])["label"][0]) for index in corpus.labelled]
    truth = corpus.test.take(range(len(corpus.test)))["label"].tolist()
    best = max(range(3), key=labels.count)
    accuracy = {arm["name"]: arm["metrics"]["accuracy"] for arm in found["arms"]}
    assert accuracy["majority"] == truth.count(best) / len(truth)
    for arm in found["arms"]:
        lead = accuracy["teacher"] - accuracy["majority"]
        shares = [(accuracy[arm["name"]] - accuracy["majority"]) / lead] if lead > 0 else []
        assert [arm["retained"][name] for name in arm["retained"] if name == "accuracy"] == shares


def test_of_many_labels_one_in_so_many_is_counted_and_a_line_says_so(finished, monkeypatch):
    monkeypatch.setattr(predictions, "COUNTED", 20)
    lines = []
    answer = predictions.majority(replace(finished.session, say=lines.append))
    assert lines == ["  majority: of 48 labelled training examples one in 3 is counted"]
    corpus = finished.session.corpus
    labels = corpus.train.take(corpus.labelled[::3])["label"].tolist()
    shares = answer({"labels": torch.zeros(1)}).logits[0].exp().tolist()
    assert shares == pytest.approx([(labels.count(each) + 1) / (16 + 3) for each in range(3)])


def test_a_random_cut_is_another_student_of_the_same_sizes_cut_by_a_plan_of_its_own(finished):
    run, session = finished.run, finished.session
    ours, drawn = StudentPlan.load(run / "plan.json"), StudentPlan.load(run / "controls/random_cut/plan.json")
    assert ours.widths == drawn.widths and len(ours.layers) == len(drawn.layers) and ours.layers != drawn.layers
    start = weights(run / "controls/random_cut/start")
    assert {name: each.shape for name, each in start.items()} == {
        name: each.shape for name, each in weights(run / "student").items()
    }
    cut = build_student(session.load(session.teacher), drawn).state_dict()
    assert all(torch.equal(each, cut[name]) for name, each in start.items())
    assert not same(run / "controls/random_cut/model", run / "distilled")


def test_a_start_from_scratch_has_no_weight_of_the_teacher(finished):
    start, student = (weights(finished.run / name) for name in ("controls/from_scratch/start", "student"))
    assert start.keys() == student.keys()
    for name in start:
        own, theirs = start[name], student[name]
        assert own.shape == theirs.shape
        assert own.ndim < 2 or not (own == theirs).logical_and(own != 0).any(), name
    assert not same(finished.run / "controls/from_scratch/model", finished.run / "controls/from_scratch/start")


def test_the_best_of_a_grid_is_chosen_by_the_validation_split_and_not_by_the_test(finished):
    session, folder = finished.session, finished.run / "controls/labels_only"
    search = json.loads((folder / "search.json").read_text())
    assert [each["lr"] for each in search["tried"]] == [1e-7, 3e-3]
    assert (search["by"], search["split"], search["chosen"]) == ("loss", "validation", 1)
    on_validation = measure_held_out(session, session.load(folder / "model"), lambda: False)
    assert search["tried"][1]["metrics"] == pytest.approx(on_validation)
    (arm,) = (arm for arm in evaluation(finished.run)["arms"] if arm["name"] == "labels_only")
    assert arm["search"] == search and arm["metrics"]["loss"] != pytest.approx(on_validation["loss"])
    line = "labels_only: best loss on validation with {'steps': 6, 'lr': 0.003}, of 2 settings"
    assert any(line in said for said in finished.done.lines)


def test_other_labels_of_the_test_choose_no_other_setting(finished, copied):
    rows = [json.loads(line) for line in (copied.recipe.parent / "data.jsonl").read_text().splitlines()]
    parts = {"train": rows[:100], "validation": rows[100:125], "test": rows[125:]}
    outcomes = []
    for turn in (False, True):
        for name, own in parts.items():
            label = (lambda row: {**row, "label": "swimmer"}) if turn and name == "test" else (lambda row: row)
            text = "".join(json.dumps(label(row)) + "\n" for row in own)
            (copied.recipe.parent / f"{name}.jsonl").write_text(text)
        files = [f"data.{name}=./{name}.jsonl" for name in parts]
        run = copied.recipe.parent / f"turned-{turn}"
        few = ["evaluation.arms=[distilled, labels_only]", "evaluation.controls.random_cut={}", "teacher.fit.steps=4"]
        distill("evaluate", copied.recipe, *ALL, *few, "data.source=null", *files, "--out", run)
        outcomes.append(json.loads((run / "controls/labels_only/search.json").read_text()))
    assert outcomes[0] == outcomes[1]
    assert evaluation(run)["arms"] != evaluation(copied.recipe.parent / "turned-False")["arms"]


def test_a_killed_control_goes_on_where_it_was_and_a_finished_try_is_not_done_again(finished, copied):
    last = {"labels_only/tries/steps=6,lr=0.003": 6, "random_cut": 4, "from_scratch": 4}
    for place, step in last.items():
        shutil.rmtree(copied.run / "controls" / place / f"checkpoints/step-{step:08}")
    for arm in CONTROLS:
        shutil.rmtree(copied.run / "controls" / arm / "model")
    (copied.run / "stages/control.json").unlink()
    done = distill("evaluate", copied.recipe, *ALL, "--out", copied.run)
    assert [line for line in done.lines if "continuing after" in line] == [
        "labels_only: continuing after step 6 of 6 (step-00000006)",
        "labels_only: continuing after step 4 of 6 (step-00000004)",
        "random_cut: continuing after step 2 of 4 (step-00000002)",
        "from_scratch: continuing after step 2 of 4 (step-00000002)",
    ]
    for arm in CONTROLS:
        assert same(copied.run / f"controls/{arm}/model", finished.run / f"controls/{arm}/model")
    assert "draw: unchanged, skipped" in done.lines and "train: unchanged, skipped" in done.lines


def test_a_control_switched_off_is_named_and_nothing_else_is_done_again(finished, copied):
    fewer = ["evaluation.arms=[teacher, distilled, labels_only]", "evaluation.controls.random_cut={}"]
    done = distill("evaluate", copied.recipe, *ALL, *fewer, "--out", copied.run)
    assert list(evaluation(copied.run)["not_run"]) == ["cut", "majority", "random_cut", "from_scratch"]
    assert "train: unchanged, skipped" in done.lines and not any(line.startswith("draw") for line in done.lines)
    assert sum(line.startswith("labels_only: continuing after step 6 of 6") for line in done.lines) == 2
    assert same(copied.run / "controls/labels_only/model", finished.run / "controls/labels_only/model")


SEEDS = [
    *ALL,
    "evaluation.arms=[teacher, cut, distilled, random_cut]",
    "evaluation.controls.labels_only={}",
    "evaluation.seeds=2",
]


@pytest.fixture(scope="module")
def seeded(finished, tmp_path_factory):
    """The run with a second seed."""
    folder = tmp_path_factory.mktemp("seeds") / "own"
    shutil.copytree(finished.recipe.parent, folder)
    done = distill("evaluate", folder / "recipe.yaml", *SEEDS, "--out", folder / "run")
    return SimpleNamespace(recipe=folder / "recipe.yaml", run=folder / "run", child=folder / "run/seeds/4", done=done)


def test_another_seed_shares_data_and_teacher_and_repeats_the_rest(finished, seeded):
    assert not any("teacher: started" in line or "data: started" in line for line in seeded.done.lines)
    assert same(seeded.run / "distilled", finished.run / "distilled")  # that of the recipe's own seed
    names = {path.name for path in seeded.child.iterdir()}
    assert "distilled" in names and not names & {"data", "teacher", "calibration.safetensors", "student", "plan.json"}
    assert not same(seeded.child / "distilled", seeded.run / "distilled")
    plans = [(run / "controls/random_cut/plan.json").read_text() for run in (seeded.run, seeded.child)]
    assert plans[0] != plans[1]


def test_mean_and_range_over_the_seeds_stand_in_the_evaluation_and_are_printed(seeded):
    found = evaluation(seeded.run)
    assert found["seeds"]["seeds"] == [3, 4] and list(found["seeds"]["arms"]) == ["distilled", "random_cut"]
    tables = [evaluation(run)["arms"] for run in (seeded.run, seeded.child)]
    own = [next(arm["metrics"]["loss"] for arm in arms if arm["name"] == "distilled") for arms in tables]
    assert own[0] != own[1]
    spread = {"values": own, "mean": pytest.approx(sum(own) / 2), "min": min(own), "max": max(own)}
    assert found["seeds"]["arms"]["distilled"]["loss"] == spread
    assert "of 2 seeds, 3, 4; released is that of seed 3" in seeded.done.printed


def test_a_seed_that_was_interrupted_goes_on_where_it_was(seeded, tmp_path):
    shutil.copytree(seeded.recipe.parent, tmp_path / "own")
    run = tmp_path / "own/run"
    child = run / "seeds/4"
    shutil.rmtree(child / "distilled")
    shutil.rmtree(child / "checkpoints/step-00000004")
    for stamp in (child / "stages/train.json", child / "stages/evaluate.json", run / "stages/seeds.json"):
        stamp.unlink()
    done = distill("evaluate", tmp_path / "own/recipe.yaml", *SEEDS, "--out", run)
    assert "distilled: continuing after step 2 of 4 (step-00000002)" in " ".join(done.lines)
    assert "seed 4: control: unchanged, skipped" in done.lines and "train: unchanged, skipped" in done.lines
    assert same(child / "distilled", seeded.child / "distilled")
    assert evaluation(run)["seeds"] == evaluation(seeded.run)["seeds"]


def test_a_grid_asks_for_a_validation_split(tmp_path):
    recipe = tiny_project(tmp_path)
    grid = "evaluation.controls.labels_only={grid: {lr: [1e-4, 1e-3]}}"
    for own, split in (([], False), ([grid], True)):
        loaded = load_recipe(recipe, ["training.evaluate_every=0", *own])
        assert looks(Session(loaded, tmp_path, RunDir(tmp_path / "run"), say=lambda _line: None)) == split


@pytest.mark.slow
def test_both_stacks_of_an_encoder_decoder_are_drawn(tmp_path):
    recipe, run = text_project(tmp_path, "t5"), tmp_path / "run"
    few = ["teacher.fit.steps=2", "training.steps=2", "evaluation.arms=[distilled, random_cut, from_scratch]"]
    distill("evaluate", recipe, *few, "--out", run)
    ours, drawn = (StudentPlan.load(run / name) for name in ("plan.json", "controls/random_cut/plan.json"))
    assert ours.encoder_layers != drawn.encoder_layers and ours.layers != drawn.layers
    sizes = [{name: each.shape for name, each in weights(run / name).items()} for name in ("distilled", "student")]
    for arm in ("random_cut", "from_scratch"):
        assert [{name: each.shape for name, each in weights(run / "controls" / arm / "model").items()}] * 2 == sizes


def command_line(arguments):
    """Be a process of the command line."""
    sys.exit(main(arguments))


@pytest.mark.slow
def test_two_processes_choose_the_same_settings_and_repeat_the_same_seeds(seeded, finished, tmp_path):
    shutil.copytree(finished.recipe.parent, tmp_path / "own")
    for stale in ("distilled", "controls", "checkpoints", "stages/train.json", "stages/control.json", "predictions"):
        path = tmp_path / "own/run" / stale
        path.unlink() if path.is_file() else shutil.rmtree(path)
    fewer = ["evaluation.arms=[teacher, distilled, labels_only, majority]", "evaluation.controls.random_cut={}"]
    arguments = [
        "evaluate",
        tmp_path / "own/recipe.yaml",
        *ALL,
        *fewer,
        "evaluation.seeds=2",
        "--out",
        tmp_path / "own/run",
    ]
    ranks = Processes(tmp_path / "log", command_line, [*map(str, arguments)], ranks=2)
    assert ranks.wait() == [0, 0], ranks.said
    ours, alone = (evaluation(run) for run in (tmp_path / "own/run", finished.run))
    expected = {arm["name"]: arm for arm in alone["arms"]}
    for arm in ours["arms"]:
        assert arm["metrics"] == pytest.approx(expected[arm["name"]]["metrics"], rel=1e-4, abs=1e-6)
        assert arm.get("lr") == expected[arm["name"]].get("lr")
    values = evaluation(seeded.run)["seeds"]["arms"]["distilled"]["loss"]["values"]
    assert ours["seeds"]["arms"]["distilled"]["loss"]["values"] == pytest.approx(values, rel=1e-4)

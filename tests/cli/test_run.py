"""The whole product through its command line, on a model and a corpus that fit in seconds."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import Processes
from safetensors.torch import load_file
from tiny import tiny_project
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distill import load_student
from distill.cli import main
from distill.models.mlp import mlps_of
from distill.models.plan import StudentPlan
from distill.student import Statistics

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def distill(*arguments, code=0):
    """Run the command line in this process, and return what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = main([str(argument) for argument in arguments])
    assert got == code, err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def command_line(arguments):
    """Be a process of the command line."""
    sys.exit(main(arguments))


def started(done):
    """The stages that a run did not skip."""
    return [line.split(":")[0] for line in done.stderr.splitlines() if line.endswith("started")]


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run: (recipe, run folder, what it printed)."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = tiny_project(folder)
    done = distill("run", recipe, "--out", folder / "run")
    return recipe, folder / "run", done


def test_widths_that_differ_are_trained_and_released_natively_and_refused_as_uniform(finished, tmp_path, monkeypatch):
    recipe, run = finished[0], tmp_path / "run"
    shutil.copytree(finished[1], run)
    (tmp_path / "uneven.py").write_text("def widths(scores, keep, multiple_of):\n    return [16, 24]\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = ["student.mlp.allocate=uneven:widths", "evaluation.arms=[teacher, distilled]", "--out", run]
    refused = distill("run", recipe, *own, code=2)
    assert "use `native` or `padded`" in refused.stderr and "train" not in started(refused)
    distill("run", recipe, "release.format=native", "evaluation.efficiency=false", *own)
    release = run / "release"
    assert [mlp.width for mlp in mlps_of(load_student(release))] == [16, 24]
    assert "trust_remote_code=True" in (release / "README.md").read_text()
    assert (release / "modeling_distill.py").is_file()


def test_every_stage_leaves_what_the_design_names(finished):
    _, run, done = finished
    expected = "recipe.yaml teacher calibration.safetensors plan.json student checkpoints metrics.jsonl"
    for name in [*expected.split(), "distilled", "evaluation.json", "report.html", "release"]:
        assert (run / name).exists(), name
    assert "labels_only" in done.stdout and "throughput," in done.stdout and "where the bytes" in done.stdout


def test_the_release_is_a_stock_model_with_its_evidence(finished):
    _, run, _ = finished
    release = run / "release"
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(release),
        AutoTokenizer.from_pretrained(release),
    )
    batch = tokenizer(["red cat runs", "blue fish"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        ours = load_student(run / "distilled")(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert torch.equal(logits, ours.logits)
    assert set(model.config.label2id) == {"mammal", "swimmer", "none"}
    for name in ("README.md", "report.html", "plan.json", "recipe.yaml", "evaluation.json", "SHA256SUMS"):
        assert (release / name).stat().st_size > 0
    assert StudentPlan.load(release / "plan.json").kept_layers == [1, 3]
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=release, check=True)
    for file in release.iterdir():
        assert str(run).encode() not in file.read_bytes(), f"{file.name} holds a path of this machine"


def test_the_control_trains_for_the_same_steps_without_the_teacher(finished):
    _, run, _ = finished
    arms = {arm["name"]: arm for arm in json.loads((run / "evaluation.json").read_text())["arms"]}
    assert list(arms) == ["teacher", "cut", "distilled", "labels_only", "majority"]
    assert arms["distilled"]["steps"] == arms["labels_only"]["steps"] == 12
    records = [json.loads(line) for line in (run / "controls/labels_only/metrics.jsonl").read_text().splitlines()]
    assert all(set(record["terms"]) == {"labels"} for record in records if record["event"] == "train")
    assert not same(weights(run / "distilled"), weights(run / "controls/labels_only/model"))
    assert arms["teacher"]["metrics"]["kl"] == 0 and arms["teacher"]["metrics"]["agreement"] == 1


def test_metrics_hold_every_part_and_the_evaluations(finished):
    _, run, _ = finished
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["event"] == "train"]
    assert [record["step"] for record in train] == [2, 4, 6, 8, 10, 12]
    assert set(train[0]["terms"]) == {"labels", "logits.forward_kl", "hidden.mse"}
    assert [record["step"] for record in records if record["event"] == "evaluate"] == [6, 12]


@pytest.mark.slow
def test_the_same_command_in_a_process_of_its_own_skips_everything(finished):
    recipe, run, first = finished
    before = (run / "evaluation.json").read_bytes()
    command = [sys.executable, "-m", "distill", "run", str(recipe), "--out", str(run)]
    again = subprocess.run(command, capture_output=True, text=True, env=ENV, check=True)
    assert again.stderr.count("unchanged, skipped") == 10 and not started(again)
    assert again.stdout == first.stdout and (run / "evaluation.json").read_bytes() == before


def test_a_changed_key_reruns_what_depends_on_it_and_nothing_else(finished, tmp_path):
    recipe, run, _ = finished
    shutil.copytree(run, tmp_path / "run")
    done = distill("release", recipe, "release.language=en", "training.log_every=5", "--out", tmp_path / "run")
    assert started(done) == ["release"]
    assert started(distill("train", recipe, "training.lr=2e-3", "--out", tmp_path / "run")) == ["train"]


def test_a_result_that_was_damaged_is_made_again(finished, tmp_path):
    recipe, run, _ = finished
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/plan.json").write_text("{}")
    done = distill("plan", recipe, "--out", tmp_path / "run")
    assert "plan: started" in done.stderr and "teacher: unchanged, skipped" in done.stderr
    assert (tmp_path / "run/plan.json").read_bytes() == (run / "plan.json").read_bytes()


@pytest.mark.slow
def test_two_processes_compute_what_one_computes(finished, tmp_path):
    recipe, run, _ = finished
    launch = str(ROOT / "recipes/accelerate/cpu-2.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", launch]
    env = {**ENV, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(ROOT / "scripts/train.py"), str(recipe), "--out", str(tmp_path / "run")],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone, shared = (Statistics.load(path / "calibration.safetensors") for path in (run, tmp_path / "run"))
    for name, total in alone.sums.items():
        torch.testing.assert_close(shared.sums[name], total, rtol=1e-4, atol=1e-6)
    one, two = weights(run / "distilled"), weights(tmp_path / "run/distilled")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)
    first = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    second = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for a, b in zip(first, second, strict=True):
        if a["event"] == "train":
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["terms"] == pytest.approx(a["terms"], rel=1e-5)
        else:
            assert b["metrics"] == pytest.approx(a["metrics"], rel=1e-5)


def test_a_teacher_spread_over_two_processes_teaches_the_same(finished, tmp_path):
    recipe, run, _ = finished
    shutil.copytree(run, tmp_path / "run")
    for made_by_training in ("checkpoints", "distilled"):
        shutil.rmtree(tmp_path / "run" / made_by_training)
    arguments = ["train", str(recipe), "teacher.device=sharded", "--out", str(tmp_path / "run")]
    done = Processes(tmp_path / "log", command_line, arguments, ranks=2)
    assert done.wait() == [0, 0] and "train: started" in done.said, done.said
    one, two = weights(run / "distilled"), weights(tmp_path / "run/distilled")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)


def test_a_launch_whose_processes_do_not_know_each_other_is_refused(finished, tmp_path):
    recipe, _, _ = finished
    arguments = ["train", str(recipe), "--out", str(tmp_path / "run")]
    own = {"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_USE_CPU": "false"}
    done = Processes(tmp_path / "log", command_line, arguments, **own)
    assert done.wait() == [2] and "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu" in done.said, done.said


def test_a_second_run_in_the_same_folder_is_refused(finished, capsys):
    from distill.pipeline.folder import RunDir

    recipe, run, _ = finished
    with RunDir(run).locked():
        assert main(["plan", str(recipe), "--out", str(run)]) == 2
    assert "in use by another distill run" in capsys.readouterr().err


def test_three_mistakes_are_one_message_with_lines_and_exit_code_2(tmp_path):
    recipe = tiny_project(tmp_path)
    text = recipe.read_text()
    for right, wrong in [
        ("weight: 0.3", "wieght: 0.3"),
        ("training: {steps: 12", "training: {steps: twelve"),
        ("keep: 2, choose", "keep: 9, choose"),
    ]:
        text = text.replace(right, wrong)
    recipe.write_text(text)
    done = distill("validate", recipe, code=2)
    assert "Traceback" not in done.stderr and "3 problems" in done.stderr
    for words in ("wieght", "weight", "training.steps", "student.layers.keep", "recipe.yaml:8", "recipe.yaml:13"):
        assert words in done.stderr, words


WRONG = [
    [],
    ["run", "nowhere.yaml"],
    ["run", "{}", "--out", "{}"],
    ["fly", "x.yaml"],
    ["run"],
    ["run", "{}", "training.lr"],
]


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_input_is_one_message_and_exit_code_2(arguments, finished, capsys):
    recipe, _, _ = finished
    assert main([argument.format(recipe) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error


def test_a_verb_that_writes_no_release_has_none_to_check(finished, capsys):
    assert main(["build", str(finished[0]), "--check-oldest"]) == 2
    assert "--check-oldest: build writes no release; give it to release or run" in capsys.readouterr().err


def test_help_and_validate_are_instant_and_need_no_torch(finished):
    recipe, _, _ = finished
    code = (
        "import sys; from distill.cli import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'datasets', 'evaluate', 'numpy'} & set(sys.modules), 'heavy import';"
        "sys.exit(code)"
    )
    for arguments in (["validate", str(recipe)], ["schema"], ["--version"], ["--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_teacher_that_is_already_trained_needs_no_fit(finished, tmp_path):
    recipe, run, _ = finished
    overrides = [f"teacher.model={run}/teacher", "teacher.init=pretrained", "teacher.fit=null"]
    done = distill("build", recipe, *overrides, "--out", tmp_path / "run")
    assert "teacher: started" not in done.stderr and not (tmp_path / "run/teacher").exists()
    assert same(weights(tmp_path / "run/student"), weights(run / "student"))


def test_a_teacher_that_does_not_know_the_classes_says_which(finished, tmp_path):
    recipe, run, _ = finished
    (tmp_path / "data.jsonl").write_text("".join(f'{{"text": "cat {i}", "label": "{i % 2}"}}\n' for i in range(60)))
    overrides = [f"teacher.model={run}/teacher", "teacher.init=pretrained", "teacher.fit=null", "data.labelled=null"]
    done = distill("build", recipe, *overrides, f"data.source={tmp_path}/data.jsonl", "--out", tmp_path / "run", code=2)
    assert "the data has the classes 0, 1, the teacher knows" in done.stderr


def test_the_recipe_in_the_run_folder_loads_from_there(finished):
    _, run, _ = finished
    assert main(["validate", str(run / "recipe.yaml")]) == 0


def test_the_recipe_of_a_release_is_valid_where_its_data_and_teacher_are_not(finished, tmp_path):
    _, run, _ = finished
    shutil.copytree(run / "release", tmp_path / "release")
    recipe = tmp_path / "release/recipe.yaml"
    assert "./teacher and ./data.jsonl: not in this release" in distill("validate", recipe).stderr
    assert "training.lr" in distill("validate", recipe, "training.lr=fast", code=2).stderr
    assert "there is no file" in distill("run", recipe, "--out", tmp_path / "run", code=2).stderr
    shutil.copytree(run / "teacher", tmp_path / "release/teacher")  # what lies beside it is looked at, and needed
    assert "no layer 9" in distill("validate", recipe, "student.layers={keep: [9]}", code=2).stderr
    assert "there is no file" in distill("run", recipe, "--out", tmp_path / "run", code=2).stderr
    (tmp_path / "release/SHA256SUMS").unlink()
    assert "there is no file" in distill("validate", recipe, code=2).stderr


def test_a_run_folder_that_holds_the_recipe_is_refused(finished, capsys):
    recipe, _, _ = finished
    assert main(["plan", str(recipe), "--out", str(recipe.parent)]) == 2
    assert "would overwrite" in capsys.readouterr().err


MISSING = ["teacher.device=sharded", "teacher.dtype=int8", "training.keep_best=bleu", "training.optimizer=math:nope"]


@pytest.mark.parametrize("override", MISSING)
def test_what_training_needs_and_cannot_have_is_said_before_anything_is_done(override, finished, tmp_path, capsys):
    recipe, _, _ = finished
    assert main(["run", str(recipe), override, "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists() and override.split("=")[0].split(".")[-1] in capsys.readouterr().err


def test_a_function_that_does_not_exist_is_said_before_anything_is_done(finished, tmp_path, capsys):
    recipe, _, _ = finished
    for override in ("student.mlp.score=no_such:score", "losses.1.loss=math:nope", "evaluation.metrics=[os.path:nope]"):
        assert main(["run", str(recipe), override, "--out", str(tmp_path / "run")]) == 2
        assert not (tmp_path / "run").exists(), capsys.readouterr().err


def test_relation_heads_that_do_not_divide_are_said_before_anything_is_done(finished, tmp_path, capsys):
    recipe, _, _ = finished
    overrides = ["losses.1={match: relations, params: {heads: 7}}", "--out", str(tmp_path / "run")]
    assert main(["run", str(recipe), *overrides]) == 2
    assert "losses.1.params.heads: 7 does not divide" in capsys.readouterr().err and not (tmp_path / "run").exists()

"""The repository as a whole: its recipes, scripts, documents, imports and public names agree with each other."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
import typer
from forked import Processes, run_script
from made_data import WORDNET, small_minilm, with_data
from quantised import small_smollm2
from tiny import tiny_batch, tiny_model, tiny_project

import distill
from distill.cli import app, main
from distill.losses import ATTENTION, HIDDEN, LOGITS, RELATION, Objective, layer_map
from distill.models.forward import forward
from distill.models.layout import LAYOUTS
from distill.models.load import load_tokenizer
from distill.pipeline.folder import RunDir
from distill.recipe import load_recipe, names
from distill.recipe.schema import Student, Term
from distill.student import build_student, calibrate, plan_student
from distill.training.loop import CHECKPOINTS, METRICS
from distill.training.optim import SCHEDULES

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "distill").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
RUNNABLE = [path for path in SCRIPTS if "__main__" in path.read_text(encoding="utf-8")]
RECIPES = sorted(ROOT.glob("recipes/*/recipe.yaml"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*/README.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci/run").read_text(encoding="utf-8")

FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "evaluate.load", "os.system"}
FORBIDDEN_MODULES = {"pickle", "dill", "joblib", "shelve", "marshal"}


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(text, *languages):
    """Contents of the fenced blocks in these languages."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [inspect.cleandoc("\n" + code) for _, language, code in found if language in languages]


def command_lines(path):
    """The simple commands of a document's shell blocks, without variables set in front of them."""
    text = "\n".join(blocks(path.read_text(encoding="utf-8"), "bash")).replace("\\\n", " ")
    for line in text.splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word not in ("&&", ";", "|"):
                words.append(word)
            elif words:
                while re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                yield words
                words = []


def distill_arguments(words):
    """What `distill` is called with, directly or through its script; None for other commands."""
    if words[0] == "distill":
        return words[1:]
    if words[0] in ("python", "accelerate") and "scripts/train.py" in words:
        return ["train", *words[words.index("scripts/train.py") + 1 :]]
    return None


COMMANDS = [(path, words) for path in DOCUMENTS for words in command_lines(path)]
CALLS = [(path, arguments) for path, words in COMMANDS if (arguments := distill_arguments(words)) is not None]


@pytest.fixture(scope="module", autouse=True)
def _smollm2(tmp_path_factory):
    """Put a tiny model in the place of the package that holds SmolLM2, which the tests do not install."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(small_smollm2(tmp_path_factory.mktemp("packages")))
        yield


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_recipe_is_valid_and_says_how_to_run_it(path, tmp_path):
    recipe = with_data(path, tmp_path)
    assert main(["validate", str(recipe)]) == 0
    assert f"distill run {name_of(path)}" in (path.parent / "README.md").read_text(encoding="utf-8")
    assert load_recipe(recipe).name == path.parent.name


def figures_of_a_stand_in(recipe, folder, metric, *overrides):
    """A figure of every arm after a whole run on made data."""
    assert main(["run", str(recipe), "--out", str(folder / "run"), "evaluation.efficiency=false", *overrides]) == 0
    table = json.loads((folder / "run/evaluation.json").read_text(encoding="utf-8"))
    assert table["data"]["source"] == "./train.jsonl, ./test.jsonl" and table["data"]["measured_on"] == "./test.jsonl"
    return {arm["name"]: arm["metrics"][metric] for arm in table["arms"]}


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["teacher", "teacher-marian"])
def test_the_recipe_of_pronunciations_runs_on_a_stand_in(teacher, tmp_path):
    recipe = with_data(ROOT / "recipes/cmudict-seq2seq/recipe.yaml", tmp_path)
    small = ["teacher.fit.steps=60", "training.steps=20", f"teacher.model=./{teacher}"]
    kl = figures_of_a_stand_in(recipe, tmp_path, "kl", *small)
    assert kl["distilled"] < kl["cut"]


@pytest.mark.slow
@pytest.mark.parametrize("name", WORDNET)
def test_the_recipes_of_wordnet_run_on_a_stand_in(name, tmp_path):
    recipe = with_data(ROOT / "recipes" / name / "recipe.yaml", tmp_path)
    small = [*small_minilm(tmp_path), "training.epochs=1", "data.limit=120"]
    vectors = name == "wordnet-retrieval"
    if not vectors:  # after 4 steps the teacher knows little
        small += ["teacher.fit.epochs=2", "data.labelled=60", "--accept-weak-teacher"]
    figures = figures_of_a_stand_in(recipe, tmp_path, "cosine_to_teacher" if vectors else "kl", *small)
    assert list(figures) == ["teacher", *([] if vectors else ["majority"]), "cut", "distilled", "labels_only"]
    assert figures["teacher"] == pytest.approx(1 if vectors else 0, abs=1e-4)
    assert (tmp_path / "run/release/model.safetensors").exists()


@pytest.mark.slow
def test_the_recipe_of_chinese_words_runs_on_a_stand_in(tmp_path):
    recipe = with_data(ROOT / "recipes/chinese-classification/recipe.yaml", tmp_path)
    kl = figures_of_a_stand_in(recipe, tmp_path, "kl", "data.labelled=100", "teacher.fit.epochs=10")
    assert kl["distilled"] < kl["cut"]


def test_every_script_gives_its_launch_lines_and_shadows_nothing():
    for path in SCRIPTS:
        module = ast.parse(path.read_text(encoding="utf-8"))
        assert path not in RUNNABLE or name_of(path) in (ast.get_docstring(module) or ""), path
        assert path.stem not in sys.stdlib_module_names and importlib.util.find_spec(path.stem) is None, path


def test_what_is_no_command_is_part_of_one():
    commands = "\n".join(path.read_text(encoding="utf-8") for path in RUNNABLE)
    for path in set(SCRIPTS) - set(RUNNABLE):
        assert f"from {path.stem} import" in commands, path


@pytest.mark.parametrize("path", RUNNABLE, ids=name_of)
def test_every_script_explains_itself(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = Processes(tmp_path / "log", run_script, path, "--help")
    assert started.wait() == [0] and "usage" in started.said.lower(), started.said


def test_the_benchmark_over_seeds_prints_every_seed_and_the_mean_of_every_metric(capsys):
    script = runpy.run_path(str(ROOT / "scripts/benchmarks/arms_over_seeds.py"))
    values = {"teacher": (0.75, 0.25), "distilled": (0.5, 0.5), "labels_only": (0.25, 0.25)}
    tables = [
        {"primary": "accuracy", "metrics": ["accuracy", "kl"], "data": {"examples": 8}, "arms":
         [{"name": name, "metrics": {"accuracy": each[seed], "kl": seed}} for name, each in values.items()]
         + [{"name": "majority", "metrics": {"accuracy": 0.25, "kl": None}}]}
        for seed in (0, 1)
    ]  # fmt: skip
    script["print_table"]([0, 1], tables)
    script["print_means"](tables)
    shown = capsys.readouterr().out
    assert "| distilled | 0.5000 | 0.5000 | 0.5000 | 100.0 % |" in shown
    assert "distilled - labels_only: +0.2500, +0.2500; mean +0.2500 over 2 seeds, 8 held-out examples each" in shown
    assert "| mean of 2 | accuracy | kl |" in shown and "| labels_only | 0.2500 | 0.5000 |" in shown
    assert "| majority | 0.2500 | nan |" in shown


def test_the_benchmark_of_building_runs_on_a_tiny_model(tmp_path):
    started = Processes(tmp_path / "log", run_script, ROOT / "scripts/benchmarks/build_large.py", "--tiny")
    assert started.wait() == [0] and re.search(r"build [\d.]+ s\npeak .*: [\d.]+x", started.said), started.said


@pytest.mark.parametrize("path", sorted({path for path, _ in CALLS}), ids=name_of)
def test_every_command_in_a_document_can_be_given(path, tmp_path):
    group = typer.main.get_command(app)
    for arguments in [arguments for of, arguments in CALLS if of == path]:
        if arguments[0].startswith("-"):
            group.make_context("distill", arguments, resilient_parsing=True)
            continue
        context = group.commands[arguments[0]].make_context(arguments[0], arguments[1:])
        shown = str(context.params.get("recipe")) == "assistant.yaml"  # tests/cli/test_language_tasks.py
        if "recipe" in context.params and not shown:
            recipe = with_data(ROOT / context.params["recipe"], tmp_path)
            load_recipe(recipe, context.params["overrides"] or ())


def test_the_documents_show_every_door():
    assert {arguments[0] for _, arguments in CALLS} >= {"run", "train"}
    verbs = typer.main.get_command(app).commands
    assert re.findall(r"^\| `distill (\w+)", README, re.MULTILINE) == list(verbs)


def test_every_script_named_in_the_documents_exists():
    for path, words in COMMANDS:
        for word in words:
            made = re.fullmatch(r"recipes/[\w-]+/data", word)  # by a script that the document names
            if not made and (word.endswith(".py") or word.startswith(("scripts/", "recipes/", "tests/"))):
                assert (ROOT / word).exists(), f"{name_of(path)} names {word}"


def test_links_and_marked_places_are_whole():
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            assert "://" in target or (path.parent / target).exists(), f"{name_of(path)} links to {target}"
        marks = re.findall(r"<!-- (/?measured)", text)
        assert marks == ["measured", "/measured"] * (len(marks) // 2), name_of(path)


def test_the_recipe_in_the_readme_is_the_quickstart():
    def settings(text):
        lines = [re.sub(r"(^|\s+)#.*", "", line).rstrip() for line in text.splitlines()]
        return [line for line in lines if line]

    shown, *_ = blocks(README, "yaml")
    assert settings(shown) == settings((ROOT / "recipes/quickstart/recipe.yaml").read_text(encoding="utf-8"))


def test_the_readme_lists_what_is_built_in():
    tables = {
        "student.layers.choose": get_args(names.LayerPolicy),
        "student.mlp.score": get_args(names.Score),
        "student.mask.score": get_args(names.MaskScore),
        "student.mlp.allocate": get_args(names.Allocation),
        "training.optimizer": get_args(names.Optimizer),
        "training.schedule": SCHEDULES,
        "data.source": get_args(names.BuiltInSource),
        "data.task": get_args(names.TaskName),
        "loss` with `match: logits": LOGITS,
        "loss` with `match: hidden": HIDDEN,
        "loss` with `match: attention": ATTENTION,
        "loss` with `match: relations": RELATION,
        "evaluation.metrics": get_args(names.Metric),
    }
    for key, built_in in tables.items():
        (row,) = re.findall(rf"^\| `{re.escape(key)}` \| (.*) \|$", README, re.MULTILINE)
        assert re.findall(r"`([\w-]+)`", row) == list(built_in), key
    (families,) = re.findall(r"^- Families: (.*?)\.", README, re.MULTILINE | re.DOTALL)
    assert re.findall(r"`([\w-]+)`", families) == list(LAYOUTS)


def test_the_run_folder_in_the_readme_is_the_run_folder():
    run = RunDir(Path())
    names = [name for name, value in vars(RunDir).items() if isinstance(value, type(vars(RunDir)["plan"]))]
    paths = [getattr(run, name) for name in names]
    (shown,) = (block for block in blocks(README, "") if block.startswith("runs/quickstart/"))
    assert len(paths) > 10
    for path in [
        *paths,
        run.root / CHECKPOINTS,
        run.root / METRICS,
        run.control("labels_only"),
        run.stamp("plan").parent,
    ]:
        assert path.parts[0] in shown, path


@pytest.fixture
def readme_modules(tmp_path, monkeypatch):
    """The Python blocks of the README as importable modules, beside a release that they can load."""
    recipe = tiny_project(tmp_path)
    release = tmp_path / "runs/quickstart/release"
    tiny_model("bert").save_pretrained(release)
    load_tokenizer(recipe.parent / "teacher").save_pretrained(release)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = []
    for number, code in enumerate(blocks(README, "python")):
        title = re.match(r"# (\w+)\.py\n", code)
        names.append(title.group(1) if title else f"readme_{number}")
        (tmp_path / f"{names[-1]}.py").write_text(code, encoding="utf-8")
    yield names
    for name in names:
        sys.modules.pop(name, None)


def test_the_python_in_the_readme_runs(readme_modules):
    assert len(readme_modules) == 4
    for name in readme_modules:
        importlib.import_module(name)


def test_the_score_in_the_readme_ranks_neurons(readme_modules):
    model, keep = tiny_model("bert"), {"keep": 0.5, "multiple_of": 8, "score": "my_scores:outgoing"}
    statistics = calibrate(model, [tiny_batch()])
    plans = [
        plan_student(model, Student(layers={"keep": 2}, mlp=keep | {"params": {"power": power}}), statistics)
        for power in (0.5, 4.0)
    ]
    assert all(plan.widths == [24, 24] for plan in plans) and plans[0] != plans[1]


def test_the_loss_in_the_readme_trains_a_student(readme_modules):
    teacher = tiny_model("bert")
    plan = plan_student(teacher, Student(layers={"keep": 2}, mlp={"score": "magnitude"}))
    maps = partial(layer_map, plan=plan, student_layers=2, teacher_layers=4)
    term = Term(match="hidden", loss="my_losses:huber", params={"delta": 0.5})
    objective = Objective([term], "sequence", maps)
    student, batch = build_student(teacher, plan), tiny_batch()
    own = forward(student, batch, objective.student)
    with torch.no_grad():
        target = forward(teacher, batch, objective.teacher)
    batch["labels"] = torch.zeros(3, dtype=torch.int64)
    loss, _ = objective(own, target, batch, objective.counts([batch]))
    loss.backward()
    pairs = [(own.hidden[s], target.hidden[t]) for s, t in enumerate(plan.kept_layers)]
    real = batch["attention_mask"].bool()
    expected = [torch.nn.functional.huber_loss(s[real], t[real], delta=0.5) for s, t in pairs]
    torch.testing.assert_close(loss, sum(expected) / 2)
    empty = importlib.import_module("my_losses").huber(torch.zeros(0, 4), torch.zeros(0, 4))
    assert empty.shape == (0,)


def test_public_names():
    assert distill.__all__ == ["__version__", "load_recipe", "load_student"]
    assert all(getattr(distill, name) for name in distill.__all__)
    with pytest.raises(AttributeError, match="load_models"):
        _ = distill.load_models
    assert set(LOGITS) == {
        "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "symmetric_kl", "total_variation",
        "soft_cross_entropy", "logit_mse", "adaptive_kl", "tail_aware_kl",
    }  # fmt: skip
    assert set(HIDDEN) == {"mse", "cosine", "normalized_mse", "relative_mse"}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (load_recipe, "(path, overrides=())"),
        (plan_student, "(model, spec, calibration=None)"),
        (build_student, "(teacher, plan)"),
        (distill.load_student, "(folder)"),
        *((loss, "(student_logits, teacher_logits, *, temperature=1.0") for loss in LOGITS.values()),
        *((loss, "(student, teacher)") for loss in HIDDEN.values()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_public_signatures(function, expected):
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    shown = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    assert shown.startswith(expected)
    assert all(p.kind is p.KEYWORD_ONLY for p in bare[2:]) or function is plan_student


def test_sources_are_short_silent_and_run_nothing_they_read():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 330, name_of(path)
        for node in ast.walk(ast.parse(text)):
            where = f"{name_of(path)}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in FORBIDDEN_CALLS | {"print"}, where
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in imported} & FORBIDDEN_MODULES, where


def test_every_module_has_its_place_in_the_import_contract():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    placed = set(re.findall(r"distill\.(\w+)", " ".join(settings["contracts"][0]["layers"])))
    own = {path.relative_to(ROOT / "distill").parts[0].removesuffix(".py") for path in SOURCES}
    assert placed == own - {"__init__"}


@pytest.mark.slow
def test_the_import_contract_holds():
    pytest.importorskip("importlinter", reason="import-linter is part of the extra `dev`")
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
        "--no-cache",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_checks_and_the_documents_name_the_same_commands():
    assert os.access(ROOT / ".ci/run", os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / ".ci/run")], check=True)
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    checks = ["ruff check", "ruff format --check", "mypy", "lint-imports", "distill run recipes/smoke/recipe.yaml"]
    for command in checks:
        assert re.search(rf'^step "[^"]*" {re.escape(command)}', CI, re.MULTILINE), command
        assert command in "\n".join(blocks(contributing, "bash")), command
    pattern = re.search(r'\$\(sed -n "s/(.*)/\\1/p" README\.md\)', CI).group(1)
    as_python = pattern.replace(r"\(", "(").replace(r"\)", ")")
    assert re.findall(as_python, README, re.MULTILINE) == ["pytest -n auto -m 'not slow'"]
    assert "distill run recipes/quickstart/recipe.yaml" in README.split("```bash")[1]


def test_tests_and_what_they_start_see_no_gpu(tmp_path):
    hidden = "import os, torch; print(repr(os.environ['CUDA_VISIBLE_DEVICES']), torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=True)
    started = Processes(tmp_path / "log", exec, hidden)
    assert done.stdout == "'' 0\n" and started.wait() == [0] and started.said == done.stdout


def test_the_oldest_versions_are_those_of_the_project():
    listed = subprocess.run([sys.executable, ROOT / ".ci/oldest.py"], capture_output=True, text=True, check=True)
    floors = set(listed.stdout.splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for each in project["dependencies"]:
        assert each.startswith("torch") or each.replace(">=", "==") in floors
    assert len([line for line in floors if line.startswith("torch==")]) == 1


def test_the_changelog_knows_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(distill.__version__)}\b", changelog, re.MULTILINE)


def test_the_label_of_what_has_none_is_defined_once():
    defined = [
        path for path in SOURCES if re.search(r"^UNLABELLED\b.*=", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert [name_of(path) for path in defined] == ["distill/models/forward.py"]

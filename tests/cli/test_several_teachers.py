"""Several teachers through the command line: mixed or each for its source, to a gated release, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from given import small
from safetensors.torch import load_file
from tiny import CLASSES, RECIPE, tiny_project
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from distill.cli import main
from distill.data import load_corpus
from distill.data.tasks import TASKS
from distill.errors import InputError
from distill.pipeline import RunDir, Session
from distill.pipeline.train_checks import check_labels
from distill.recipe import load_recipe

pytestmark = pytest.mark.slow

ONE = """\
teacher:
  model: ./teacher
  init: random
  fit: {steps: 12, batch_size: 8, micro_batch_size: 4, lr: 3e-3, save_every: 4}
"""
MIXED = RECIPE.replace(ONE, "teachers:\n  - {model: ./one, weight: 3}\n  - {model: ./two}\n").replace(
    "labelled: 24, ", ""
)
ROUTED = MIXED.replace(
    "teachers:\n  - {model: ./one, weight: 3}\n  - {model: ./two}\n",
    "teachers:\n  - {model: ./one, sources: [./data.jsonl]}\n  - {model: ./two, sources: [./more.jsonl]}\n",
).replace("source: ./data.jsonl, task: classification,", "train: [./data.jsonl, ./more.jsonl], task: causal_lm,")
NAMES = sorted({*CLASSES.values(), "none"})
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: at for at, name in enumerate(NAMES)}}
QUICK = ["training.steps=4", "evaluation.efficiency=false", "--accept-weak-teacher"]


def project(folder, recipe=MIXED, family="bert", head=AutoModelForSequenceClassification, **changes):
    """A recipe with two teachers of one tokenizer, of different widths; their weights are random."""
    path = tiny_project(folder, recipe, family)
    sizes = {"one": {}, "two": {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}}
    for seed, (name, own) in enumerate(sizes.items()):
        torch.manual_seed(seed)
        labels = LABELS if head is AutoModelForSequenceClassification else {}
        small(folder, family, head, name=name, initializer_range=0.5, **{**labels, **own, **changes})
    return path


def finish(path, *overrides):
    assert main(["run", str(path), *QUICK, *overrides, "--out", str(path.parent / "run")]) == 0
    return path.parent / "run"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return finish(project(tmp_path_factory.mktemp("mixed")))


def test_a_mixture_teaches_a_student_to_a_release(mixed):
    table = json.loads((mixed / "evaluation.json").read_text())
    arms = {arm["name"]: arm["metrics"] for arm in table["arms"]}
    assert list(arms) == ["teacher", "teachers", "cut", "distilled", "labels_only", "majority"]
    assert arms["teachers"]["kl"] == pytest.approx(0, abs=1e-6) and arms["teachers"]["agreement"] == 1
    assert arms["teacher"]["kl"] > 1e-3  # the first teacher is not what taught
    assert [(one["model"], one["weight"]) for one in table["taught_by"]] == [("./one", 3.0), ("./two", 1.0)]


def test_what_students_are_compared_with_is_the_weighted_sum_of_the_teachers_probabilities(mixed, tmp_path):
    kls = {}
    for name, weights in {"first": (1e9, 1e-9), "second": (1e-9, 1e9)}.items():
        given = [f"teachers.{number}.weight={weight}" for number, weight in enumerate(weights)]
        recipe = ["evaluate", str(mixed.parent / "recipe.yaml"), *QUICK, *given, "evaluation.arms=[teacher]"]
        assert main([*recipe, "training.steps=1", "--out", str(tmp_path / name)]) == 0
        arms = json.loads((tmp_path / name / "evaluation.json").read_text())["arms"]
        kls[name] = {arm["name"]: arm["metrics"]["kl"] for arm in arms}
        rows = load_file(tmp_path / name / "predictions" / "teachers.safetensors")
        kls[f"{name} nll"] = rows["nll"]
    assert kls["first"]["teacher"] == pytest.approx(0, abs=1e-6) and kls["second"]["teacher"] > 1e-3
    middle = -(0.75 * torch.exp(-kls["first nll"]) + 0.25 * torch.exp(-kls["second nll"])).log()
    torch.testing.assert_close(
        load_file(mixed / "predictions" / "teachers.safetensors")["nll"], middle, atol=1e-6, rtol=1e-5
    )


def test_card_names_all_teachers_and_says_what_figures_are_against(mixed, capsys):
    card = (mixed / "release" / "README.md").read_text()
    assert "| teacher 1 | ./one, weight 3 |" in card and "| teacher 2 | ./two, weight 1 |" in card
    assert "2 teachers taught: agreement and KL are against their mixture" in card
    assert "teachers (the mixture that taught)" in card and str(mixed.parent) not in card
    assert main(["validate", str(mixed / "release" / "recipe.yaml")]) == 0
    assert "./one and ./two and ./data.jsonl: not in this release" in capsys.readouterr().err


def test_another_weight_trains_again_and_another_placement_does_not(mixed, capsys):
    recipe = ["train", str(mixed.parent / "recipe.yaml"), *QUICK, "--out", str(mixed)]
    assert main([*recipe, "teachers.1.device=cpu"]) == 0
    assert "train: unchanged, skipped" in capsys.readouterr().err
    assert main([*recipe, "teachers.1.weight=2"]) == 0
    said = capsys.readouterr().err
    assert "train: runs again (teacher.shares" in said and "build: unchanged, skipped" in said


def test_each_teacher_teaches_the_rows_of_its_source(tmp_path):
    path = project(tmp_path, ROUTED, "llama", AutoModelForCausalLM, intermediate_size=48)
    rows = (tmp_path / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data.jsonl").write_text("".join(rows[:70]))
    (tmp_path / "more.jsonl").write_text("".join(rows[70:]))
    (tmp_path / "other.jsonl").write_text("".join(rows[:9]))
    run = finish(path, "evaluation.sets={other: ./other.jsonl}")
    corpus = load_corpus(run / "data", TASKS["causal_lm"]())
    assert set(corpus.splits["sets.other"].take(range(3))["route"]) == {2}, "that of a source which nobody teaches"
    for split in ("train", "test"):
        examples = corpus.splits[split]
        taken = examples.take(range(len(examples)))
        assert set(taken["route"].tolist()) == {0, 1}
    table = json.loads((run / "evaluation.json").read_text())
    assert [one["sources"] for one in table["taught_by"]] == [["./data.jsonl"], ["./more.jsonl"]]
    first = load_file(run / "predictions" / "teacher.safetensors")
    routes = torch.from_numpy(corpus.test.take(first["example"].tolist())["route"])
    kl = first["kl_sum"] / first["positions"]
    assert kl[routes == 0].abs().max() < 1e-5 < 1e-3 < kl[routes == 1].min()  # it taught its own rows only
    assert "./two, weight 1, on ./more.jsonl" in (run / "release" / "README.md").read_text()


REFUSED = {
    "teacher={model: ./one}": "teachers: teacher is given as well, and only one can hold",
    "teachers=[]": "teacher: missing; give a section with the keys model, fit",
    "teachers.1.fit={steps: 2}": "teachers.1.fit: only the first of several teachers is fitted here",
    "teachers.1.dtype=fp8": "teachers.1.dtype: what fp8 changes is judged for one teacher alone",
    "teachers.0.device=sharded": "teachers.0.device: several teachers are not sharded",
    "teachers.1.sources=[./dat.jsonl]": "teachers.1.sources.0: ./dat.jsonl is no training source",
    "teachers.1.model=./three": "teachers.1.model: ./three: there is no folder",
    "teachers.0.revision=main": "teachers.0.revision: has no effect: only hub ids have revisions",
    "teachers.1.weight=0": "teachers.1.weight: expected above 0, got the number 0",
    "data.max_length=65": "data.max_length: 65 tokens per example, the teacher has 64 positions",
    "teachers=[{model: ./one}, {model: ./llama}]": "teachers.1.model: its class 0 is 'LABEL_0'",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    path = project(folder)
    small(folder, "llama", AutoModelForSequenceClassification, name="llama", num_labels=3)
    return path


@pytest.mark.parametrize("override", REFUSED)
def test_teachers_that_do_not_go_together_are_refused(override, plain, tmp_path, capsys):
    assert main(["run", str(plain), override, "--out", str(tmp_path / "run")]) == 2
    assert REFUSED[override] in capsys.readouterr().err


def test_a_source_without_a_teacher_is_refused(plain, capsys):
    given = ["teachers.0.sources=[./data.jsonl]", "teachers.1.sources=[./data.jsonl]"]
    sources = "data.source=[./data.jsonl, stdlib-docstrings]"
    assert main(["validate", str(plain), *given, sources]) == 2
    assert "teachers: no teacher has stdlib-docstrings among its sources" in capsys.readouterr().err


def test_a_mixture_of_vectors_is_refused(plain, capsys):
    assert main(["validate", str(plain), "data.task=embedding", "losses=[{match: hidden}]"]) == 2
    assert "teachers: vectors of different teachers lie in different spaces" in capsys.readouterr().err


def test_the_plan_counts_the_memory_of_all_teachers(plain, tmp_path, capsys):
    def teacher_row(*overrides):
        assert main(["plan", str(plain), *overrides, "--memory", "1GB"]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if "teacher" in line)

    alone = teacher_row("teachers=[]", "teacher={model: ./one}")
    assert teacher_row() != alone and teacher_row("teachers.1.device=cpu") == alone
    assert main(["plan", str(plain), "--out", str(tmp_path / "run")]) == 0
    assert "several teachers are not timed" in capsys.readouterr().out


def test_tokens_that_a_task_writes_anew_are_refused_where_only_the_first_teacher_is_fitted(plain, tmp_path, capsys):
    data = {"text": "dog sees cat", "head": [0, 3], "tail": [9, 12], "relation": "sees"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(data) + "\n")
    given = [
        "teachers.0.fit={steps: 1}",
        f"data={{source: {tmp_path}/rows.jsonl, task: relation_extraction, max_length: 16}}",
    ]
    assert main(["plan", str(plain), *given, "--out", str(tmp_path / "run")]) == 2
    words = "teachers.1.model: task: relation_extraction writes [E1], [/E1], [E2], [/E2], which only the first"
    assert words in capsys.readouterr().err


def losses_of(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["event"] == "train"]


@pytest.mark.parametrize(("recipe", "cache"), [(MIXED, "{keep: hidden, dtype: fp32}"), (ROUTED, "{keep: topk, k: 20}")])
def test_a_mixture_teaches_from_disk_what_it_teaches_live(tmp_path, monkeypatch, recipe, cache):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    routed = recipe is ROUTED
    path = project(tmp_path, recipe, *([("llama"), AutoModelForCausalLM] if routed else []))
    if routed:
        rows = (tmp_path / "data.jsonl").read_text().splitlines()
        (tmp_path / "more.jsonl").write_text("\n".join(rows[::2]))
    given = ["training.log_every=1", "evaluation.arms=[teacher, distilled]"]
    if routed:
        given.append("losses=[{match: logits}]")
    command = ["train", str(path), *QUICK, *given]
    words = len(json.loads((tmp_path / "teacher/tokenizer.json").read_text())["model"]["vocab"])
    cache = cache.replace("20", str(words))
    assert main([*command, "--out", str(tmp_path / "live")]) == 0
    assert main([*command, f"teachers.0.cache={cache}", "--out", str(tmp_path / "kept")]) == 0
    assert losses_of(tmp_path / "kept") == pytest.approx(losses_of(tmp_path / "live"), rel=1e-3 if routed else 1e-5)


def test_a_mixture_is_kept_once_and_not_as_hidden_states_of_one(tmp_path, capsys):
    path = project(tmp_path)
    assert main(["validate", str(path), "teachers.1.cache={keep: hidden}"]) == 2
    assert "under the first teacher alone" in capsys.readouterr().err
    given = ["data.task=causal_lm", "teachers.0.cache={keep: hidden}", "losses=[{match: logits}]"]
    assert main(["validate", str(path), *given]) == 2
    assert "write keep: topk" in capsys.readouterr().err


def test_answers_that_the_student_writes_have_no_teacher_of_their_own(tmp_path, capsys):
    path = project(tmp_path, ROUTED.replace("task: causal_lm", "task: chat"))
    (tmp_path / "more.jsonl").write_text((tmp_path / "data.jsonl").read_text())
    assert main(["validate", str(path), "training.on_policy={share: 0.5}", "losses=[{match: logits}]"]) == 2
    assert "comes from no source" in capsys.readouterr().err


def test_what_one_of_several_teachers_lacks_is_said_with_its_key(tmp_path, capsys):
    path = project(tmp_path)
    assert main(["run", str(path), "teachers.1.dtype=int8", "--out", str(tmp_path / "run")]) == 2
    assert "teachers.1.dtype: int8 needs" in capsys.readouterr().err


def test_what_does_not_fit_the_first_of_several_teachers_is_said_with_its_key(tmp_path):
    recipe = load_recipe(project(tmp_path), ["teachers.0.fit={steps: 1}"])
    session = Session(recipe, tmp_path, RunDir(tmp_path / "run"), print)
    vars(session)["corpus"] = SimpleNamespace(head="sequence", labelled=[])
    with pytest.raises(InputError, match=r"learn from labels: teachers\.0\.fit, losses\.0"):
        check_labels(session)

"""`distill verify`: a release is measured again, and whatever was changed in it is named."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from given import FITTED, GIVEN, GPT2, TINY, small
from safetensors.torch import load_file, save_file
from spans import question_rows, spans_project
from tiny import RECIPE, tiny_config, tiny_project
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from distill.cli import main
from distill.files import sha256_of

pytestmark = pytest.mark.slow


def verify(release, *options, code=0):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = main(["verify", str(release), *map(str, options)])
    assert got == code, err.getvalue()
    return SimpleNamespace(table=out.getvalue(), said=err.getvalue())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of one finished run, whose data lie beside it."""
    folder = tmp_path_factory.mktemp("verified")
    recipe = tiny_project(folder)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["run", str(recipe), "--out", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def release(finished, tmp_path):
    """Return a copy of its release, to tamper with."""
    return shutil.copytree(finished / "run/release", tmp_path / "release")


def sign_again(release):
    """Write the checksums anew, as someone would who hides a change."""
    files = [file for file in sorted(release.rglob("*")) if file.is_file() and file.name != "SHA256SUMS"]
    lines = [f"{sha256_of(file)}  {file.relative_to(release)}\n" for file in files]
    (release / "SHA256SUMS").write_text("".join(lines))


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_release_as_it_was_written_holds_in_every_figure(finished, release):
    found = verify(release, "--data", finished, "--teacher", finished / "run/teacher")
    assert "every claim that was checked holds" in found.said
    for name in ("accuracy", "agreement", "kl"):
        assert re.search(rf"distilled, {name}\b.*the same", found.table)
    assert re.search(r"teacher, accuracy\b.*the same", found.table) and "DIFFERS" not in found.table


def test_figures_about_a_fitted_teacher_are_named_as_not_checked_without_it(finished, release):
    found = verify(release, "--data", finished)
    assert re.search(r"distilled, kl\b.*not checked: needs the", found.table)
    assert re.search(r"labels_only .*not checked: not", found.table)


def test_data_of_the_users_own_have_to_be_given(release):
    assert "./data.jsonl: give the folder with --data" in verify(release, code=2).said


def test_a_folder_that_is_no_release_is_refused(tmp_path):
    assert "no release" in verify(tmp_path, code=2).said
    (tmp_path / "evaluation.json").write_text('{"arms": [{"name": 3}]}')
    said = verify(tmp_path, code=2).said
    assert (
        "evaluation.json is not as distill wrote it (data: Field required)" in said and "no release of distill" in said
    )


def test_changed_weights_are_caught_with_and_without_their_checksum(finished, release):
    weights = load_file(release / "model.safetensors")
    head = next(name for name in weights if name.endswith("classifier.weight"))
    weights[head] = -weights[head]
    save_file(weights, release / "model.safetensors", {"format": "pt"})
    found = verify(release, "--data", finished, code=1)
    assert re.search(r"file model\.safetensors.*DIFFERS", found.table)
    sign_again(release)
    found = verify(release, "--data", finished, code=1)
    assert "file model" not in found.table and re.search(r"distilled, accuracy\b.*DIFFERS", found.table)


def test_an_edited_figure_is_caught_in_the_evaluation_and_on_the_card(finished, release):
    def improve(content):
        next(arm for arm in content["arms"] if arm["name"] == "distilled")["metrics"]["accuracy"] = 0.999

    edit(release / "evaluation.json", improve)
    sign_again(release)
    found = verify(release, "--data", finished, code=1)
    assert re.search(r"distilled, accuracy\b.*DIFFERS", found.table)
    assert re.search(r"card, a line.*DIFFERS", found.table)


def test_a_figure_that_was_edited_within_its_interval_is_caught_as_the_interval_is_that_of_another(finished, release):
    def improve(content):
        arm = next(arm for arm in content["arms"] if arm["name"] == "distilled")
        arm["metrics"]["loss"] = (arm["metrics"]["loss"] + arm["intervals"]["loss"]["low"]) / 2

    edit(release / "evaluation.json", improve)
    sign_again(release)
    found = verify(release, "--data", finished, code=1)
    assert re.search(r"distilled, loss\b.*DIFFERS", found.table)


def test_an_interval_that_was_edited_is_caught(finished, release):
    def narrow(content):
        arm = next(arm for arm in content["arms"] if arm["name"] == "distilled")
        arm["intervals"]["loss"]["low"] = arm["metrics"]["loss"] * 0.999

    edit(release / "evaluation.json", narrow)
    sign_again(release)
    assert re.search(r"distilled, loss\b.*DIFFERS", verify(release, "--data", finished, code=1).table)


def test_a_share_and_a_difference_that_do_not_follow_from_the_figures_are_caught(finished, release):
    def improve(content):
        next(arm for arm in content["arms"] if arm["name"] == "distilled")["retained"]["accuracy"] = 0.999
        next(pair for pair in content["differences"] if pair["against"] == "cut")["metrics"]["accuracy"]["value"] = 0.5

    assert re.search(r"shares and differences .*the same", verify(release, "--data", finished).table)
    edit(release / "evaluation.json", improve)
    sign_again(release)
    found = verify(release, "--data", finished, code=1)
    assert re.search(r"shares and differences .* distilled, less cut .*DIFFERS", found.table)


def test_an_edited_card_is_caught(finished, release):
    card = (release / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| distilled"))
    (release / "README.md").write_text(card.replace(row, re.sub(r"\d\d\.\d %", "99.9 %", row)))
    sign_again(release)
    found = verify(release, "--data", finished, code=1)
    assert re.search(r"card, a line.*DIFFERS", found.table) and "distilled, accuracy" in found.table


def test_a_card_that_another_version_wrote_is_named_as_not_compared(finished, release):
    card = (release / "README.md").read_text()
    (release / "README.md").write_text(re.sub(r"(?m)^\| distill \| \S+ \|$", "| distill | 9.9.9 |", card))
    sign_again(release)
    found = verify(release, "--data", finished)
    assert "9.9.9" in found.table and "report, its charts" not in found.table
    assert "every claim that was checked holds" in found.said


def within_json(name, change):
    return lambda release: edit(release / name, change)


def replaced(name, pattern, text):
    def change(release):
        before = (release / name).read_text()
        assert re.search(pattern, before)
        (release / name).write_text(re.sub(pattern, text, before, count=1))

    return change


def student_of(content):
    return content["efficiency"]["models"]["student"]


def classes_of(content):
    return next(iter(content["per_class"]["classes"]["distilled"].values()))


def evaluation(change):
    return within_json("evaluation.json", change)


BESIDE = {
    "classes of distilled": evaluation(lambda own: classes_of(own).update(f1=0.99)),
    "distilled less teacher": evaluation(lambda own: own["differences"][0]["metrics"]["loss"].update(low=-9.0)),
    "student, parameters,": evaluation(lambda own: student_of(own).update(flops_per_example=1)),
    "student, ratios of": evaluation(lambda own: own["efficiency"]["ratios"]["student"].update(parameters=0.1)),
    "data, as counted": evaluation(lambda own: own["data"].update(train_examples=9)),
    "arms, metrics and": evaluation(lambda own: own.update(rivals={}, primary="loss")),
    "plan, policies": within_json("plan.json", lambda own: own.update(layer_policy="greedy_loss")),
    "tokenizer_config.json,": within_json("tokenizer_config.json", lambda own: own.update(chat_template="{{ 1 }}")),
    "config.json, as": within_json("config.json", lambda own: own.update(hidden_dropout_prob=0.9)),
    "file pytorch_model.bin": lambda release: (release / "pytorch_model.bin").write_text("x"),
    "file chat_template": lambda release: (release / "chat_template.jinja").write_text("x"),
    "file more": lambda release: (release / "more").mkdir(),
    "report, a line": replaced("report.html", "</body>", "<script>1</script></body>"),
    "card, a line": evaluation(lambda own: student_of(own)["latency_ms"].update(p50=0.01)),
}
"""The claim that does not hold, and what somebody changed."""


def test_whatever_is_edited_beside_the_metrics_is_caught_where_the_checksums_were_written_anew(finished, release):
    for change in BESIDE.values():
        change(release)
    sign_again(release)
    found = verify(release, "--data", finished, "--teacher", finished / "run/teacher", code=1)
    rows = [line for line in found.table.splitlines() if "DIFFERS" in line]
    assert [claim for claim in BESIDE if not any(f"│ {claim}" in row for row in rows)] == []


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("instead of [0-9.]+ k", "instead of 99.9 M"),
        ("## Results", "## Results\n\nIt is the best."),
        ("license: apache-2.0", "license: mit"),
        ("from transformers", "import os\nfrom transformers"),
    ],
)
def test_any_line_of_the_card_that_the_figures_do_not_give_is_caught(finished, release, pattern, text):
    replaced("README.md", pattern, text)(release)
    sign_again(release)
    assert re.search(r"card, a line.*DIFFERS", verify(release, "--data", finished, code=1).table)


def test_weights_of_another_model_of_this_shape_are_caught_inside_the_intervals(finished, release):
    shutil.copy(finished / "run/controls/labels_only/model/model.safetensors", release)
    sign_again(release)
    found = verify(release, "--data", finished, code=1)
    assert re.search(r"distilled, loss\b.*DIFFERS", found.table)


def test_without_the_teacher_a_line_says_that_its_files_were_not_compared(finished, release):
    found = verify(release, "--data", finished)
    assert re.search(r"configs, tokenizer and .*not checked: needs the", found.table)


def test_another_tokenizer_is_caught(finished, release):
    def swap(content):
        words = content["model"]["vocab"]
        first, second = [word for word in words if word.isalpha()][:2]
        words[first], words[second] = words[second], words[first]

    edit(release / "tokenizer.json", swap)
    sign_again(release)
    found = verify(release, "--data", finished, code=1)
    assert re.search(r"data, as tokens.*DIFFERS", found.table)


def test_missing_and_added_files_are_caught(finished, release):
    (release / "plan.json").rename(release / "plan2.json")
    shutil.copy(release / "plan2.json", release / "plan.json")
    (release / "report.html").unlink()
    found = verify(release, "--data", finished, code=1)
    assert re.search(r"file plan2\.json.*not listed.*DIFFERS", found.table)
    assert re.search(r"file report\.html.*missing.*DIFFERS", found.table)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replaced("recipe.yaml", r"source: \./data\.jsonl", "source: os:abort"), "names functions, os:abort"),
        (evaluation(lambda own: own["metrics"].append("os:abort")), "names functions, os:abort"),
        (evaluation(lambda own: own.update(forms={"x": 3})), "evaluation.json is not as distill wrote it (forms.x"),
        (evaluation(lambda own: own.update(seeds={"seeds": [1], "arms": {"a": {"b": {}}}, "sets": {}})), "(seeds.arms"),
    ],
)
def test_a_release_of_a_stranger_calls_nothing_and_is_refused_with_one_message(finished, release, change, said):
    change(release)
    sign_again(release)
    assert said in verify(release, "--data", finished, code=2).said


def test_figures_that_cannot_be_divided_do_not_hold(finished, release):
    edit(
        release / "evaluation.json", lambda own: own["efficiency"]["models"]["teacher"].update(parameters=0, bytes="x")
    )
    sign_again(release)
    assert "card, a line" in verify(release, "--data", finished, code=1).table


def test_changed_data_are_caught(finished, release, tmp_path):
    lines = (finished / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data.jsonl").write_text("".join(lines[:-1]))
    assert re.search(r"data, as tokens.*DIFFERS", verify(release, "--data", tmp_path, code=1).table)


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors", "recipe.yaml", "tokenizer.json", "README.md"])
def test_any_missing_file_ends_with_one_message(finished, release, name):
    (release / name).unlink()
    code = 1 if name in ("plan.json", "README.md") else 2
    found = verify(release, "--data", finished, code=code)
    assert name.split(".")[0] in found.table + found.said


def test_figures_of_a_set_that_the_recipe_does_not_have_do_not_hold(finished, release):
    def add(content):
        content["sets"]["more"] = {"arms": content["arms"]}

    edit(release / "evaluation.json", add)
    sign_again(release)
    found = verify(release, "--data", finished, code=1)
    assert re.search(r"rows of more.*DIFFERS", found.table)


def test_a_release_of_a_given_student_is_measured_where_that_student_is_not(tmp_path):
    recipe = tiny_project(tmp_path, GIVEN)
    small(tmp_path, **TINY)
    own = ["evaluation.efficiency=false", "evaluation.arms=[distilled]", "--out", str(tmp_path / "run")]
    assert main(["run", str(recipe), *own]) == 0
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "data.jsonl", tmp_path / "elsewhere")
    found = verify(tmp_path / "run/release", "--data", tmp_path / "elsewhere")
    assert re.search(r"distilled, accuracy\b.*the same", found.table)


def test_a_teacher_that_is_not_there_is_said_with_its_option(finished, release, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = verify(release, "--data", finished, "--teacher", "nobody/nothing", code=2)
    assert "--teacher: cannot get 'nobody/nothing' from the model hub" in found.said


TEXTS = "task: causal_lm"
CUT = RECIPE[RECIPE.index("student:") : RECIPE.index("data:")]


def narrowed_by_a_mask(folder):
    mask = "student.mask={per: neuron, sparsity: 0.4, only: ['*.layer.1.*'], compact: true}"
    return tiny_project(folder), [mask, "student.mlp.multiple_of=2", "release.format=padded"], "run/teacher"


def taught_by_source(folder):
    recipe = GIVEN.replace("task: classification, labelled: 24", TEXTS).replace("source: ./data.jsonl", "SOURCES")
    start, rest = recipe.split("teacher:\n")[0], CUT + recipe[recipe.index("data:") :]
    teachers = "".join(f"  - {{model: ./{name}, sources: [./{rows}.jsonl]}}\n" for name, rows in ROUTES.items())
    own = f"{start}teachers:\n{teachers}{rest}".replace("SOURCES", "train: [./data.jsonl, ./more.jsonl]")
    path = tiny_project(folder, own, "llama")
    for name in ROUTES:
        small(folder, "llama", AutoModelForCausalLM, name=name)
    rows = (folder / "data.jsonl").read_text().splitlines(keepends=True)
    for name, part in {"data": rows[:70], "more": rows[70:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(part))
    return path, [], "one"


def taught_by_a_family_that_packs_no_rows(folder):
    path = tiny_project(folder, GIVEN.replace("task: classification, labelled: 24", TEXTS), "opt")
    small(folder, "gpt2", AutoModelForCausalLM, **GPT2)
    return path, ["losses=[{match: logits}]"], "run/teacher"


def fitted_with_a_tokenizer_that_had_cut_texts(folder):
    return spans_project(folder, question_rows(100)), ["teacher.fit.steps=4"], "run/teacher"


def taught_by_a_model_that_does_not_say_it_gives_sets(folder):
    path = tiny_project(folder, FITTED.replace("  from: ./small\n", CUT.removeprefix("student:\n")))
    names = ["cat", "dog", "fish"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}
    config = tiny_config("bert", pad_token_id=0, **labels)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "teacher")
    rows = [json.loads(line)["text"] for line in (folder / "data.jsonl").read_text().splitlines()]
    lines = [{"text": text, "label": [name for name in names if name in text]} for text in rows]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, [], "teacher"


ROUTES = {"one": "data", "two": "more"}
HONEST = [
    narrowed_by_a_mask,
    taught_by_source,
    taught_by_a_family_that_packs_no_rows,
    fitted_with_a_tokenizer_that_had_cut_texts,
    taught_by_a_model_that_does_not_say_it_gives_sets,
]


@pytest.mark.slow
@pytest.mark.parametrize("made", HONEST)
def test_nothing_is_said_against_a_release_that_nobody_edited(made, tmp_path):
    path, own, teacher = made(tmp_path)
    own += ["training.steps=2", "evaluation.efficiency=false", "evaluation.arms=[distilled]", "--accept-weak-teacher"]
    assert main(["run", str(path), *own, "--out", str(tmp_path / "run")]) == 0
    for given in ([], ["--teacher", tmp_path / teacher]):
        assert "every claim that was checked holds" in verify(tmp_path / "run/release", "--data", tmp_path, *given).said


def test_rows_of_one_document_are_drawn_together_in_the_run_and_by_verify(tmp_path):
    plain = RECIPE.replace("task: classification, labelled: 24", "task: causal_lm, test: ./test.jsonl")
    recipe = tiny_project(tmp_path, plain, "llama")
    long = [f"red cat number {number} runs fast " * 4 for number in range(12)]  # each fills several rows
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in long))
    own = ["evaluation.efficiency=false", "evaluation.arms=[teacher, distilled]", "--accept-weak-teacher"]
    assert main(["run", str(recipe), *own, "--out", str(tmp_path / "run")]) == 0
    drawn = json.loads((tmp_path / "run/evaluation.json").read_text())["drawn"]
    assert drawn["unit"] == "documents"
    verify(tmp_path / "run/release", "--data", tmp_path)

"""Files of strangers, each given to `distill` in a process of its own with little time and memory.

None may run code, write outside of the run folder, connect to anything, print what steers a terminal or end in a
traceback.
"""

from __future__ import annotations

import json
import os
import shutil
import unicodedata

import pytest
from forked import Processes
from hostile import ESCAPES, PICKLE, RECIPES, ROWS, SECRETS, TEACHERS, config, parquet, put, server, strike
from tiny import tiny_model, tiny_project

from distill.files import content_of

READY = [
    "teacher.init=pretrained",
    "teacher.fit=null",
    "evaluation={arms: [teacher, distilled], efficiency: false}",
    "training={steps: 2, batch_size: 4}",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A project with a trained teacher, and beside it what nobody is to see."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "project").mkdir()
    tiny_project(folder / "project")
    labels = dict(enumerate(("mammal", "none", "swimmer")))
    tiny_model("bert", vocab_size=17, pad_token_id=0, id2label=labels).save_pretrained(folder / "project/teacher")
    (folder / "outside").mkdir()
    (folder / "outside/secret.txt").write_text("private")
    shutil.copy(folder / "project/teacher/model.safetensors", folder / "outside/w.safetensors")
    return folder


@pytest.fixture
def project(base, tmp_path):
    return shutil.copytree(base, tmp_path / "all") / "project"


def commands(verbs, project, overrides=(), code=2):
    given = [str(project / "recipe.yaml"), *READY, *overrides]
    own = {"validate": given, "inspect": [str(project / "teacher")]}
    return [(code, verb, *own.get(verb, [*given, "--out", str(project / "run")])) for verb in verbs]


def attack(project, asked, **limits):
    """Give commands to `distill`; returns what it said, with everything beside the run folder as it was."""
    for name in ("tmp", "cache"):
        (project.parent / name).mkdir()
    places = {"TMPDIR": str(project.parent / "tmp"), "DISTILL_CACHE": str(project.parent / "cache")}
    before = _everything(project)
    log = project.parent / "log"
    done = Processes(
        log, strike, project, project / "run", asked, *limits.values(), **places, **SECRETS, RUST_BACKTRACE="0"
    )
    code, said = done.wait(), done.said
    assert code == [0] and "Traceback" not in said and len(said) < 20_000, (code, said[:3000])
    assert not [each for each in said if unicodedata.category(each) in ("Cc", "Cf") and each != "\n"], repr(said)
    assert not [word for word in (*SECRETS.values(), "private") if word in said]
    assert _everything(project) == before
    return said


def _everything(project):
    own = [
        path
        for path in project.parent.rglob("*")
        if not {"run", "tmp", "cache", "log"} & {*path.relative_to(project.parent).parts}
    ]
    return {
        str(path): os.readlink(path) if path.is_symlink() else content_of(path) for path in own if not path.is_dir()
    }


@pytest.mark.parametrize("name", TEACHERS)
def test_a_strangers_teacher_is_refused(name, project):
    verbs, change = TEACHERS[name]
    change(project)
    assert "error" in attack(project, commands(verbs, project))


@pytest.mark.parametrize("name", ROWS)
def test_strangers_data_are_refused(name, project):
    verbs, change, file = ROWS[name]
    change(project)
    assert "error" in attack(project, commands(verbs, project, [f"data.source=./{file}"] if file else []))


@pytest.mark.parametrize("name", RECIPES)
def test_a_strangers_recipe_is_refused(name, project):
    RECIPES[name](project)
    assert "error" in attack(project, [(2, "validate", str(project / "recipe.yaml"))])


def test_a_parquet_file_that_calls_texts_pictures_is_read_as_texts_and_asks_nobody(project):
    listening, address = server()
    with listening:
        parquet(project, "Image", [f"{address} {word}" for word in "abcdefghij" * 9])
        attack(project, commands(["plan"], project, ["data={source: ./own.parquet, task: causal_lm}"], 2))
        with pytest.raises(BlockingIOError):
            listening.accept()


SCRIPT = "<script>alert(1)</script>"


def make_hostile(project):
    """Make a project that nothing is wrong with, and that carries everything that must not come through."""
    customer = project.parent / "customer-acme"
    customer.mkdir()
    labels = {
        "mammal": f"{SCRIPT}{ESCAPES}",
        "none": "](javascript:alert)|`x`",
        "swimmer": '"><img src=x onerror=alert(1)>',
    }
    lines = [json.loads(line) for line in (project / "data.jsonl").read_text().splitlines()]
    texts = [
        f"{line['text']} {SCRIPT} {ESCAPES}" * (number % 9 == 0) or line["text"] for number, line in enumerate(lines)
    ]
    rows = [{"text": text, "label": labels[line["label"]]} for text, line in zip(texts, lines, strict=True)]
    (customer / "data.jsonl").write_text("".join(json.dumps(own) + "\n" for own in rows))
    shutil.move(project / "teacher", customer / "teacher")
    code = {
        "AutoModelForSequenceClassification": "evil.Evil",
        "AutoConfig": "attacker/repo--evil.Evil",
        "AutoTokenizer": ["evil.Evil", None],
    }
    named = {"auto_map": code, "custom_pipelines": {"evil": {"impl": "evil.Evil"}}}
    (project / "teacher").symlink_to(customer / "teacher")
    config(project, id2label=dict(enumerate(labels.values())), label2id={}, _name_or_path=str(customer), **named)
    config(project, "tokenizer_config.json", name_or_path=str(customer), **named)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        put(f"teacher/{name}", PICKLE)(project)
    for name in (
        "evil.py",
        "custom_generate/generate.py",
        "modeling_bert.py",
        "tokenization.py",
        "json.py",
        "torch.py",
    ):
        put(f"teacher/{name}", "open('RAN', 'w')")(project)
    for name in ("json.py", "torch.py", "accuracy.py", "datasets.py", "evaluate.py"):
        put(name, "open('RAN', 'w')")(project)
    put(
        "teacher/chat_template.jinja",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ ''.__class__ }}{% endfor %}{% endfor %}",
    )(project)
    return ["teacher.model=../customer-acme/teacher", "data.source=./../customer-acme/data.jsonl"]


def test_what_is_not_refused_runs_nothing_and_leaves_nothing_of_it_in_the_release(project):
    overrides = make_hostile(project)
    attack(project, commands(["run"], project, overrides, 0), seconds=60)
    run = project / "run"
    files = [path for path in run.rglob("*") if path.is_file()]
    contents = {path: path.read_bytes() for path in (*files, *(project.parent / "cache").rglob("*")) if path.is_file()}
    assert not [path for path, content in contents.items() for word in SECRETS.values() if word.encode() in content]
    released = {path: content for path, content in contents.items() if path.is_relative_to(run / "release")}
    assert len(released) >= 9 and not [path for path in released if path.suffix in (".py", ".bin", ".pt", ".pth")]
    for word in (b"auto_map", b"custom_pipelines", b"evil.Evil", b"customer", bytes(project.parent)):
        assert not [path.name for path, content in released.items() if word in content], word
    pages = {path.name: content.decode() for path, content in released.items() if path.suffix in (".md", ".html")}
    assert {*pages} == {"README.md", "report.html"} and all("alert(1)" in page for page in pages.values())
    for name, page in pages.items():
        assert SCRIPT not in page and "<img src=x" not in page, name
        assert not [each for each in page if unicodedata.category(each) == "Cc" and each != "\n"], name

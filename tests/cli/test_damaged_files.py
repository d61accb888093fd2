"""Every file of a run folder or of a release in another shape: one message or a stage that runs again, no traceback."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny import tiny_project

from distill.cli import main
from distill.files import content_of

pytestmark = pytest.mark.slow
FEW = [
    "evaluation={arms: [teacher, distilled, labels_only], efficiency: false,"
    " controls: {labels_only: {grid: {lr: [1e-3, 1e-4]}}}}",
    "student.repair.bias=true",
    "student.calibration.gram=true",
    "student.repair.held_out=8",
    "teacher.cache={keep: hidden}",
    "teacher.fit.steps=2",
    "training.steps=2",
]
SHAPES = {
    "empty": b"",
    "list": b"[]",
    "object": b"{}",
    "null": b"null",
    "NaN": b'{"accuracy": NaN}',
    "junk": b"\x00\xff\x1b[2J" * 9,
    "folder": None,
    "link": "/dev/null",
}
WRITTEN = (
    *("evaluation.json", "plan.json", "teacher.json", "repair.json", "teacher_cache.json", "data/corpus.json"),
    *("controls/labels_only/search.json", "calibration.safetensors", "student/config.json", "distilled/config.json"),
    *("distilled/model.safetensors", "distilled/tokenizer.json", "data/test.arrow", "teacher/config.json"),
)
"""What stages leave for others."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project with a finished run."""
    folder = tmp_path_factory.mktemp("damaged")
    recipe = tiny_project(folder)
    assert main(["run", str(recipe), *FEW, "--out", str(folder / "run")]) == 0
    return folder


def damage(path, shape):
    """Put something else in the place of a file."""
    content = SHAPES[shape]
    path.unlink()
    if content is None:
        path.mkdir()
    elif isinstance(content, str):
        path.symlink_to(content)
    else:
        path.write_bytes(content)


def agree(run, name):
    """Make the stamp of the stage say that the file is as the stage left it."""
    for stamp in (run / "stages").glob("*.json"):
        found = json.loads(stamp.read_text())
        for result in found["results"]:
            if f"{name}/".startswith(f"{result}/"):
                found["results"][result] = content_of(run / result)
                stamp.write_text(json.dumps(found))


def again(finished, run, verb="evaluate"):
    return main([verb, str(finished / "recipe.yaml"), *FEW, "--out", str(run)])


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in ("folder", "link")])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_of_another_shape_that_its_stamp_agrees_with_is_one_message(name, shape, finished, tmp_path, capsys):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    damage(run / name, shape)
    agree(run, name)
    (run / "stages/evaluate.json").unlink() if name != "evaluation.json" else None
    code = again(finished, run)
    said = capsys.readouterr().err
    assert code in (0, 2) and said.count("error: ") == code // 2, said


@pytest.mark.parametrize("first", [0, 2])
def test_a_run_folder_of_damaged_files_is_made_anew(first, finished, tmp_path):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    shapes = [shape for shape in SHAPES if shape not in ("folder", "link")]
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    for number, path in enumerate(files, start=first):
        damage(path, shapes[number % len(shapes)])
    assert again(finished, run) == 0


@pytest.mark.parametrize("name", ["evaluation.json", "metrics.jsonl", "calibration.safetensors", "data/test.arrow"])
def test_a_folder_in_the_place_of_a_file_is_refused(name, finished, tmp_path, capsys):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    damage(run / name, "folder")
    assert again(finished, run) == 2
    assert f"run/{name} is a folder, where a run has a file; remove it" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in ("null", "list")])
def test_a_release_with_a_damaged_file_is_refused_or_said_to_differ(shape, finished, tmp_path):
    other = shutil.copytree(finished / "run/release", tmp_path / "other")
    for file in sorted((finished / "run/release").iterdir()):
        release = shutil.copytree(finished / "run/release", tmp_path / "release")
        damage(release / file.name, shape)
        assert main(["verify", str(release), "--data", str(finished)]) in (1, 2), file.name
        if file.name in ("evaluation.json", "recipe.yaml"):
            assert main(["compare", str(release), str(other)]) == 2, file.name
        assert main(["push", str(release), "me/model", "--yes"]) == 2, file.name
        shutil.rmtree(release)

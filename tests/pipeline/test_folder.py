from __future__ import annotations

import os

import pytest
from tiny import tiny_project

from distill.cli import main
from distill.errors import InputError
from distill.files import content_of, fresh_folder, sha256_of, write_json, write_text
from distill.pipeline.folder import RunDir


def test_a_failed_write_leaves_the_old_folder_and_nothing_beside_it(tmp_path):
    with fresh_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), fresh_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("half")
        _ = 1 / 0
    assert (tmp_path / "model/a").read_text() == "old" and os.listdir(tmp_path) == ["model"]


def test_write_text_replaces_and_leaves_nothing_beside(tmp_path):
    write_text(tmp_path / "deep/a.json", "one")
    write_text(tmp_path / "deep/a.json", "two")
    assert (tmp_path / "deep/a.json").read_text() == "two" and len(list((tmp_path / "deep").iterdir())) == 1


def test_write_text_does_not_write_through_a_link_left_under_its_temporary_name(tmp_path):
    (tmp_path / "own").write_text("mine")
    (tmp_path / ".a.json.tmp").symlink_to(tmp_path / "own")
    write_text(tmp_path / "a.json", "text")
    assert (tmp_path / "own").read_text() == "mine" and (tmp_path / "a.json").read_text() == "text"


def test_nan_is_refused_as_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})


def test_content_sees_names_and_bytes_of_every_file(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f/a").write_text("x")
    first = content_of(tmp_path / "f")
    (tmp_path / "f/a").rename(tmp_path / "f/b")
    assert content_of(tmp_path / "f") != first and content_of(tmp_path / "missing") == ""


def test_an_edited_file_of_the_same_size_and_time_has_another_sum(tmp_path):
    file = tmp_path / "a"
    file.write_text("one")
    before, stat = sha256_of(file), file.stat()
    file.write_text("two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert sha256_of(file) != before


def test_the_lock_is_released_when_the_block_ends(tmp_path):
    run = RunDir(tmp_path / "run")
    with run.locked(), pytest.raises(InputError, match="in use"), run.locked():
        pass
    with run.locked():
        pass


def test_a_run_folder_that_is_a_link_to_nowhere_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "unmounted")
    words = r"it is a link to .*unmounted, which is not there; make it, or give another --out"
    with pytest.raises(InputError, match=words), RunDir(tmp_path / "run").locked():
        pass


def test_a_release_moved_aside_by_a_killed_run_returns(tmp_path):
    (tmp_path / "run/.release.old").mkdir(parents=True)
    with RunDir(tmp_path / "run").locked():
        assert (tmp_path / "run/release").is_dir() and not (tmp_path / "run/.release.old").exists()


def test_a_run_folder_that_is_holds_or_lies_in_an_input_is_refused(tmp_path):
    teacher, data = tmp_path / "out/teacher", tmp_path / "texts/data.jsonl"
    for file in (teacher / "config.json", data):
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    inputs = {"teacher.model": teacher, "data.source": data}
    for folder, relation in [
        (tmp_path / "out", "holds teacher.model"),
        (teacher, "is teacher.model"),
        (teacher / "run", "lies in teacher.model"),
        (tmp_path / "texts", "holds data.source"),
        (tmp_path, "holds teacher.model"),
    ]:
        with pytest.raises(InputError, match=relation):
            RunDir(folder).check(inputs)
    RunDir(tmp_path / "run").check(inputs)


def test_the_source_teacher_survives_a_run_folder_that_is_its_parent(tmp_path, capsys):
    (tmp_path / "r").mkdir()
    tiny_project(tmp_path).rename(tmp_path / "r/recipe.yaml")
    before = content_of(tmp_path / "teacher")
    overrides = ["teacher.model=../teacher", "data.source=../data.jsonl"]
    assert main(["plan", str(tmp_path / "r/recipe.yaml"), *overrides, "--out", str(tmp_path)]) == 2
    assert "holds" in capsys.readouterr().err and content_of(tmp_path / "teacher") == before


def test_a_folder_with_files_of_the_users_is_refused_and_a_linked_run_folder_is_not(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and no run folder"):
        RunDir(tmp_path / "notes").check({})
    (tmp_path / "other disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "other disk")
    run = RunDir(tmp_path / "run")
    run.check({})
    with run.locked():
        run.check({})


LINKED = [
    ".lock",
    "checkpoints",
    "metrics.jsonl",
    "micro_batches.json",
    ".recipe.yaml.tmp",
    "release",
    ".release.tmp",
    "stages/plan.json",
]


@pytest.mark.parametrize("name", LINKED)
def test_a_link_inside_a_run_folder_is_refused(name, tmp_path):
    run, target = RunDir(tmp_path / "run"), tmp_path / "target"
    with run.locked():
        pass
    (run.root / ".lock").unlink() if name == ".lock" else None
    (run.root / name).parent.mkdir(exist_ok=True)
    (run.root / name).symlink_to(target)
    with pytest.raises(InputError, match=r"is a link|not empty and no run folder"):
        run.check({})
    assert not target.exists()

from __future__ import annotations

import pytest

from distill.errors import InputError
from distill.files import content_of, fresh_folder, write_json, write_text
from distill.pipeline.folder import RunDir


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    with fresh_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), fresh_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("half")
        _ = 1 / 0
    assert (tmp_path / "model/a").read_text() == "old"


def test_write_text_replaces_and_leaves_nothing_beside(tmp_path):
    write_text(tmp_path / "deep/a.json", "one")
    write_text(tmp_path / "deep/a.json", "two")
    assert (tmp_path / "deep/a.json").read_text() == "two" and len(list((tmp_path / "deep").iterdir())) == 1


def test_nan_is_refused_as_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})


def test_content_sees_names_and_bytes_of_every_file(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f/a").write_text("x")
    first = content_of(tmp_path / "f")
    (tmp_path / "f/a").rename(tmp_path / "f/b")
    assert content_of(tmp_path / "f") != first and content_of(tmp_path / "missing") == ""


def test_the_lock_is_released_when_the_block_ends(tmp_path):
    run = RunDir(tmp_path / "run")
    with run.locked(), pytest.raises(InputError, match="in use"), run.locked():
        pass
    with run.locked():
        pass

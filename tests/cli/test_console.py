"""What a stranger's data is called reaches the terminal without what would steer it."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_model, tiny_project

from distill.cli import main
from distill.release.table import Table
from distill.terminal import print_table

EVIL = "\x1b]0;owned\x07\x1b[2Jevil\x9b31m"
READY = ["teacher.init=pretrained", "teacher.fit=null", "evaluation.arms=[teacher, distilled]"]


def renamed(row, what):
    if what == "column":
        return {EVIL: row["text"], "label": row["label"]}
    return {**row, "label": EVIL if row["label"] == "mammal" else row["label"]}


@pytest.mark.parametrize("what", ["class", "column"])
def test_names_of_classes_and_columns_in_a_message(what, tmp_path, capsys):
    recipe, file = tiny_project(tmp_path), tmp_path / "data.jsonl"
    tiny_model("bert", vocab_size=17, pad_token_id=0).save_pretrained(tmp_path / "teacher")
    rows = [renamed(json.loads(line), what) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    assert main(["build", str(recipe), *READY, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "owned" in error and not {"\x1b", "\x07", "\x9b"} & set(error)


def test_names_in_tables(capsys):
    print_table(EVIL, Table((EVIL,), [(EVIL,)]))
    table = capsys.readouterr().out
    assert table.count("owned[2Jevil31m") == 3 and not {"\x1b", "\x07", "\x9b"} & set(table)

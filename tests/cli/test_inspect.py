"""`distill inspect` on real folders: every row of the tables is tried, and wrong input is one message."""

from __future__ import annotations

import pytest
import torch
from tiny import LAYERS, tiny_batch, tiny_model, tiny_project

from distill.cli import main
from distill.models.mlp import mlps_of
from distill.release.wording import MISSING
from distill.student import LAYER_POLICIES, calibrate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny BERT with tokenizer, texts and calibration; layer 2 has zeros, layer 1 three silent neurons."""
    folder = tmp_path_factory.mktemp("inspect")
    tiny_project(folder)
    bert = tiny_model("bert", pad_token_id=0)
    with torch.no_grad():
        mlps_of(bert)[2].weights_in[0][:, ::2] = 0
        mlps_of(bert)[1].weight_out[:, :3] = 0
    bert.save_pretrained(folder / "teacher")
    calibrate(bert, [tiny_batch()]).save(folder / "c.safetensors")
    (folder / "texts.txt").write_text("".join(f"red cat {'runs ' * n}\n" for n in range(1, 30)))
    return folder


def tables(text):
    """Title -> rows of cells of each printed table."""
    found, title, before = {}, "", ""
    for line in text.splitlines():
        if line.startswith("┏"):
            title = before.strip()
            found[title] = []
        elif line.startswith("│"):
            found[title].append([cell.strip() for cell in line.strip("│").split("│")])
        before = line
    return found


def test_without_data_everything_that_needs_none_is_shown_and_the_rest_has_a_reason(model, capsys):
    assert main(["inspect", str(model / "teacher")]) == 0
    shown = tables(capsys.readouterr().out)
    assert [row[4] for row in shown["Weights"]] == ["0.0 %", "3.1 %", "25.0 %", "0.0 %"]  # 3 / 48 / 2 and 1 / 2 / 2
    assert [row[5] for row in shown["Weights"]] == ["0 of 48", "3 of 48", "0 of 48", "0 of 48"]
    assert "Redundancy of layers" not in shown
    policies = {row[0]: row for row in shown["Which layers would go, keeping 2 of 4"]}
    assert set(LAYER_POLICIES) <= set(policies) and policies["even"][1:3] == ["0, 3", "1, 2"]
    assert policies["block_influence"][1] == MISSING and "calibration" in policies["block_influence"][3]


def test_with_a_calibration_layers_blocks_and_every_policy_are_shown(model, capsys):
    assert (
        main(["inspect", str(model / "teacher"), "--calibration", str(model / "c.safetensors"), "--keep-layers", "3"])
        == 0
    )
    shown = tables(capsys.readouterr().out)
    assert len(shown["Redundancy of layers"]) == LAYERS and shown["Redundancy of layers"][1][2] != MISSING
    assert [row[0] for row in shown["Redundancy of blocks"]] == [*"123"]
    assert all(0 <= float(row[2]) <= 1 for row in shown["Redundancy of blocks"])
    policies = {row[0]: row for row in shown["Which layers would go, keeping 3 of 4"]}
    assert len(policies["block_influence"][1].split(", ")) == 3


def test_statistics_can_be_gathered_over_texts(model, capsys, monkeypatch):
    monkeypatch.chdir(model)
    assert main(["inspect", "teacher", "--data", "texts.txt", "--examples", "8", "--max-length", "6"]) == 0
    assert len(tables(capsys.readouterr().out)["Redundancy of layers"]) == LAYERS


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "t5"])
def test_other_layouts_are_inspected(family, tmp_path, capsys):
    tiny_model(family).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    shown = tables(capsys.readouterr().out)
    assert len(shown["Weights"]) == LAYERS and ("Weights of the encoder" in shown) == (family == "t5")


WRONG = [
    (["nowhere"], "neither"),
    (["./nowhere"], "there is no folder"),
    (["package:no_such_package/model"], "not installed"),
    (["{}"], "has no config.json; name what lies in it, as"),
    (["{}/teacher", "--calibration", "{}/none"], "not a calibration file"),
    (["{}/teacher", "--calibration", "{}/texts.txt"], "not a calibration file"),
    (["{}/teacher", "--data", "no-such-source"], "unknown data source"),
    (["{}/teacher", "--data", "{}/none.csv"], "there is no file"),
    (["{}/teacher", "--data", "texts", "--calibration", "{}/c.safetensors"], "give one of them"),
    (["{}/teacher", "--keep-layers", "9"], "the model has 4"),
    (["{}/teacher", "--keep-layers", "0"], "keep-layers"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=lambda value: str(value)[:50])
def test_wrong_input_is_one_message_and_exit_code_2(arguments, words, model, capsys):
    assert main(["inspect", *(argument.format(model) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error.replace("\n", " ")


def test_the_calibration_of_another_model_is_refused(model, tmp_path, capsys):
    tiny_model("bert", intermediate_size=32).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--calibration", str(model / "c.safetensors")]) == 2
    assert "calibration of another model" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--examples", "--max-length"])
def test_how_much_is_read_says_nothing_without_data(model, option, capsys):
    assert main(["inspect", str(model / "teacher"), option, "4"]) == 2
    assert "say what is read with --data" in capsys.readouterr().err

"""The teacher in every stage: in the dtype and the place that the recipe asks for."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import RECIPE, tiny_project

from distill.cli import main
from distill.pipeline import RunDir, Session, calibrate, evaluate, examine, plan, repair
from distill.pipeline.teachers import read_licences
from distill.recipe import load_recipe
from distill.training.provenance import flatten

REPAIRED = RECIPE.replace("  calibration:", "  repair: {bias: true, refit: true}\n  calibration:")


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    recipe = str(tiny_project(folder, REPAIRED))
    assert main(["plan", recipe, "--out", str(folder / "run")]) == 0
    return folder


def session_of(folder, *overrides):
    lines = []
    return Session(load_recipe(folder / "recipe.yaml", overrides), folder, RunDir(folder / "run"), lines.append), lines


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("asked", "dtype"), [("stored", torch.float32), ("bf16", torch.bfloat16)])
def test_the_teacher_has_the_dtype_that_the_recipe_asks_for(planned, whole, asked, dtype):
    session, lines = session_of(planned, f"teacher.dtype={asked}", "teacher.device=cpu")
    teacher = session.live_teacher(whole=whole)
    assert teacher.model.dtype == dtype and teacher.device.type == "cpu" and not lines
    assert not teacher.model.training and not any(tensor.requires_grad for tensor in teacher.model.parameters())


def test_a_stage_that_reads_weights_says_that_it_takes_a_sharded_teacher_whole(planned):
    session, lines = session_of(planned, "teacher.device=sharded", "teacher.dtype=fp16")
    teacher = session.live_teacher(whole=True)
    assert teacher.model.dtype == torch.float16 and type(teacher.model.classifier.weight) is torch.nn.Parameter
    assert lines == ["  the whole teacher is needed here, not shards or 8 bits: it is in main memory, in fp16"]


@pytest.mark.parametrize("stage", [calibrate, plan, repair, evaluate])
def test_another_dtype_makes_every_stage_that_runs_the_teacher_due(planned, stage):
    inputs = [stage.inputs(session_of(planned, f"teacher.dtype={name}")[0]) for name in ("stored", "bf16")]
    assert inputs[0] != inputs[1]


@pytest.mark.parametrize("stage", [calibrate, plan, repair, evaluate, examine])
def test_a_teacher_computes_in_the_precision_of_the_training_unless_it_has_one_of_its_own(planned, stage):
    def inputs(*overrides):
        return flatten(stage.inputs(session_of(planned, *overrides)[0]))

    plain, half = inputs(), inputs("training.precision=bf16")
    assert not any("precision" in key for key in plain)
    assert {key for key in half if plain.get(key) != half[key]} >= {"teacher.precision"}
    assert "teacher.precision" not in inputs("training.precision=bf16", "teacher.dtype=fp32")
    for name, wanted in (("stored", "bf16"), ("int8", "bf16"), ("fp32", "fp32"), ("bf16", "fp32")):
        session, _ = session_of(planned, "training.precision=bf16", f"teacher.dtype={name}")
        assert session.precision_of(session.recipe.teacher) == wanted


def test_a_run_with_a_teacher_in_bf16_in_main_memory_repairs_and_measures(planned, tmp_path):
    arguments = [
        "teacher.dtype=bf16",
        "teacher.device=cpu",
        "evaluation.efficiency=false",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(["evaluate", str(planned / "recipe.yaml"), *arguments]) == 0
    arms = json.loads((tmp_path / "run/evaluation.json").read_text())["arms"]
    assert [arm["name"] for arm in arms] == ["teacher", "cut", "repaired", "distilled", "labels_only", "majority"]
    assert arms[0]["metrics"]["kl"] < 0.01  # the stored teacher beside the one in bf16


def test_a_stage_that_measures_a_teacher_in_fp8_says_that_it_takes_the_stored_weights(planned):
    session, lines = session_of(planned, "teacher.dtype=fp8")
    assert session.live_teacher(whole=True).model.dtype == torch.float32
    assert lines == [
        "  the whole teacher is needed here, not shards or 8 bits: it is in the device, in its stored dtype"
    ]


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\nText", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("---\nlicense: other\nlicense_name: ours\n---\n", {"license": "other", "license_name": "ours"}),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\n- license\n---\n", None),
        ("license: mit", None),
        ("---\nlicense: [mit\n---\n", None),
        ("---\nlicense: " + 99_999 * "[" + "\n---\n", None),
    ],
)
def test_a_licence_is_read_from_the_head_of_the_models_card(tmp_path, head, found):
    tiny_project(tmp_path)
    (tmp_path / "teacher/README.md").write_bytes(head.encode())
    session, lines = session_of(tmp_path)
    assert read_licences(session) == ({"./teacher": found} if found else {})
    broken = "[mit\n" in head or "[[" in head
    assert len(lines) == broken and all("no licence is read" in line for line in lines)

"""Run folders that something else has written to: refused, or made anew, with one message."""

from __future__ import annotations

import json
import os

import pytest

from distill.errors import InputError
from distill.files import sha256_of, write_json, write_text
from distill.models.plan import KeptUnits, StudentPlan
from distill.pipeline.folder import RunDir
from distill.training.checkpoint import Checkpoints, TrainState
from distill.training.tracking import drop_after, read_records

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("name", [".lock", "stages/plan.json", "calibration.safetensors", "data/train.arrow"])
def test_a_pipe_in_a_run_folder_is_refused_before_anything_waits_for_it(name, tmp_path):
    run = RunDir(tmp_path)
    with run.locked():
        pass
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="is no regular file"):
        run.check({})


def test_folders_in_the_place_of_temporary_files_and_odd_names_do_no_harm(tmp_path):
    run = RunDir(tmp_path)
    for name in ("..old", ".x.old/a", "...old", ".recipe.yaml.tmp/a"):
        (tmp_path / name).mkdir(parents=True)
    with run.locked():
        write_text(run.recipe, "name: x\n")
    assert run.recipe.read_text() == "name: x\n" and (tmp_path / "x/a").is_dir()


LAYER = {"teacher_layer": 0, "kept": {"mlp": {"of": 8, "units": [0, 1]}}}
PLAN = {"model_type": "bert", "teacher_layers": 4, "layers": [LAYER, {**LAYER, "teacher_layer": 2}]}
PLAN |= dict.fromkeys(("layer_policy", "mlp_score", "mlp_allocation"), "x")


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [{**LAYER, "teacher_layer": number} for number in (0, 99)]},
        {"layers": [{**LAYER, "teacher_layer": number} for number in (2, 0)]},
        {"layers": [{**LAYER, "teacher_layer": 10**30}]},
        {"layers": [{**LAYER, "kept": {"mlp": {"of": 10**9, "units": [10**6]}}}]},
        {"layers": [{**LAYER, "kept": {"mlp": {"of": 10**30}}}]},
        {"layers": [{**LAYER, "kept": {"mlp": {"of": 8, "units": [-1, 3]}}}]},
        {"layers": [{**LAYER, "kept": {"mlp": {"of": 8, "units": [3, 8]}}}]},
        {"encoder_layers": [LAYER, LAYER]},
    ],
)
def test_a_plan_of_what_no_teacher_has_is_refused(change, tmp_path):
    write_json(tmp_path / "plan.json", PLAN)
    assert StudentPlan.load(tmp_path / "plan.json").kept_layers == [0, 2]
    write_json(tmp_path / "plan.json", PLAN | change)
    with pytest.raises(InputError, match="is not a student plan"):
        StudentPlan.load(tmp_path / "plan.json")


def test_all_units_of_experts_are_a_plan():
    assert KeptUnits(of=4, units=[[0, 1], [2, 3]]).count == 2 and KeptUnits(of=4).count == 4
    with pytest.raises(ValueError, match="equally many"):
        KeptUnits(of=4, units=[[0, 1], [2]])


@pytest.mark.parametrize(
    "change",
    [
        {"evil": 1},
        {"evaluated": -1},
        {"micro_batch_halvings": 10**9},
        {"micro_batch_size": "x"},
        {"tokens": 1.5},
        {"numbers": 7},
        DEEP,
    ],
)
def test_a_checkpoint_whose_state_is_none_is_passed_over(change, tmp_path):
    said = []
    own = Checkpoints(tmp_path, {"seed": 1}, said.append)
    for step in (1, 2):
        own.make_draft(step)
        weights = own.draft(step) / "model.safetensors"
        weights.write_bytes(b"weights")
        own.publish(TrainState(step=step), {weights.name: sha256_of(weights)})
    state, manifest = tmp_path / "step-00000002/state.json", tmp_path / "step-00000002/MANIFEST.json"
    state.write_text(change if change == DEEP else json.dumps(json.loads(state.read_text()) | change))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"state.json": sha256_of(state)}))
    assert own.newest_valid().name == "step-00000001"
    assert len(said) == 1 and said[0].startswith("checkpoint step-00000002 is passed over: ")


@pytest.mark.parametrize("line", ["{", "[]", DEEP, '"x"'])
def test_a_damaged_log_is_one_message_and_a_resumed_run_drops_the_line(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged"):
        read_records(path)
    drop_after(path, 1)
    assert read_records(path) == [{"step": 1}]

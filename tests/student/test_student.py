from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import LAYERS, WIDTH, tiny_batch, tiny_model

from distill import load_student
from distill.errors import InputError
from distill.models.family import layers_of
from distill.models.plan import StudentPlan
from distill.recipe.schema import Student
from distill.student import build_student, calibrate, plan_student
from distill.student.plan import top_units


def spec(keep=2, width=0.5, **mlp):
    layers = {"keep": keep} if isinstance(keep, list) else {"keep": keep, "choose": "even"}
    return Student.model_validate({"layers": layers, "mlp": {"keep": width, "multiple_of": 8, **mlp}})


def logits(model, batch=None):
    with torch.no_grad():
        return model(**(batch or tiny_batch())).logits


def test_a_plan_that_keeps_everything_names_no_neuron():
    teacher = tiny_model("bert")
    plan = plan_student(teacher, spec(list(range(LAYERS)), 1.0, score="magnitude"))
    assert [layer.neurons for layer in plan.layers] == [None] * LAYERS and plan.widths == [WIDTH] * LAYERS
    assert torch.equal(logits(build_student(teacher, plan)), logits(teacher))


def test_tied_embeddings_stay_tied(tmp_path):
    teacher = tiny_model("llama", tie_word_embeddings=True)
    student = build_student(teacher, plan_student(teacher, spec(score="magnitude")))
    assert student.lm_head.weight is student.model.embed_tokens.weight
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(load_student(tmp_path)), logits(student))


def test_lists_with_one_entry_per_layer_are_cut_with_the_layers(tmp_path):
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    teacher = tiny_model("qwen2", layer_types=types, use_sliding_window=True, sliding_window=4)
    student = build_student(teacher, plan_student(teacher, spec([1, 2], score="magnitude")))
    assert student.config.layer_types == ["sliding_attention", "full_attention"]
    student.save_pretrained(tmp_path)  # refused by transformers when the list and the depth disagree


def test_block_influence_reads_raw_layer_outputs():
    # By hand from the layer modules themselves; `hidden_states[-1]` would be after the final norm.
    model, batch = tiny_model("llama"), tiny_batch(padded=False)
    seen = {}
    last = layers_of(model)[-1]
    handle = last.register_forward_hook(
        lambda _m, args, output: seen.update(before=args[0], after=output if torch.is_tensor(output) else output[0])
    )
    logits(model, batch)
    handle.remove()
    expected = 1 - torch.nn.functional.cosine_similarity(seen["before"], seen["after"], dim=-1).mean()
    got = calibrate(model, [batch]).block_influence()[-1]
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=1e-6)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_ties_keep_the_lower_neuron(values, data):
    width = data.draw(st.integers(1, len(values)))
    kept = top_units(torch.tensor(values, dtype=torch.float64), width) or list(range(len(values)))
    assert kept == sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:width])


def test_plan_round_trips_as_json(tmp_path):
    plan = plan_student(tiny_model("bert"), spec([1, 3], score="magnitude"))
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert StudentPlan.load(tmp_path / "plan.json") == plan
    assert plan.kept_layers == [1, 3]
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(InputError, match="not a student plan"):
        StudentPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("units", [[7, 5], [5, 48], [], [[5, 7], [6]]])
def test_a_plan_that_contradicts_itself_is_refused(units, tmp_path):
    plan = json.loads(plan_student(tiny_model("bert"), spec([1, 3], score="magnitude")).to_json())
    plan["layers"][1]["kept"]["mlp"]["units"] = units
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(InputError, match="ascending indices below 48, equally many for each expert"):
        StudentPlan.load(tmp_path / "plan.json")


def test_rounding_is_reported_as_asked_and_got():
    plan = plan_student(tiny_model("bert"), spec(2, 0.45, score="magnitude"))
    choice = plan.outcomes["student.mlp.keep"]
    assert (choice.asked, choice.got) == ("0.45 of 48", "16 of 48") and "multiple of 8" in choice.reason


@pytest.mark.parametrize(
    ("layers", "width", "score", "words"),
    [
        (5, 0.5, "magnitude", "the teacher has 4"),
        ([0, 4], 0.5, "magnitude", r"student\.layers\.keep\.1: the teacher has no layer 4"),
        (2, 0.5, "activation", "needs calibration"),
    ],
)
def test_an_impossible_request_is_one_clear_error(layers, width, score, words):
    with pytest.raises(InputError, match=words):
        plan_student(tiny_model("bert"), spec(layers, width, score=score))


def test_a_score_of_ones_own_is_one_function(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text(
        "def first(layer, statistics, *, offset: int = 0):\n"
        "    import torch\n"
        "    return -torch.arange(layer.weight_out.shape[1]).float().sub(offset).abs()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plan = plan_student(tiny_model("bert"), spec([0], 8, score="my_scores:first", params={"offset": 10}))
    assert plan.layers[0].neurons == [6, 7, 8, 9, 10, 11, 12, 13]


@pytest.mark.slow
def test_a_student_loads_in_a_process_without_distill(tmp_path):
    teacher = tiny_model("llama")
    build_student(teacher, plan_student(teacher, spec(score="magnitude"))).save_pretrained(tmp_path)
    code = (
        "import sys, transformers; m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "assert 'distill' not in sys.modules and m.config.num_hidden_layers == 2"
    )
    subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path)], check=True)
